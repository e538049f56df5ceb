"""The paper's figures made anew, and a verdict on each of its claims: `./scripts/replicate`.

`plan` says what is run, `pipeline` runs it, `cells` reads the sweeps, `statistics` measures, `claims` and `verdicts`
decide; `figures`, `gradients`, `extensions` and `report` write what is left behind.
"""
