"""The paper's figures made anew, and a verdict on each of its claims: `./scripts/replicate`.

`plan` says what is run, `cells` reads what came out, `verdicts` has the rules, `claims` the claims, `figures` and
`report` what is left behind.
"""
