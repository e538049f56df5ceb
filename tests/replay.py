"""A second, plain program for the same experiment: numpy, loops, and nothing of the package.

It replays a full-batch run from what the run left behind, and chooses the flips itself.
"""

import json
import math
from pathlib import Path

import numpy as np
import yaml


def softmax_gradient(theta: np.ndarray, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient of the mean cross-entropy; one row of theta is the sigmoid of label 1."""
    Z = X @ theta.T
    if theta.shape[0] == 1:
        R = 1 / (1 + np.exp(-Z[:, 0])) - y
        return (R @ X / len(X))[None]
    P = np.exp(Z - Z.max(1, keepdims=True))
    P /= P.sum(1, keepdims=True)
    P[np.arange(len(y)), y] -= 1
    return P.T @ X / len(X)


def choose(
    theta: np.ndarray, v: np.ndarray, X: np.ndarray, y: np.ndarray, mine: np.ndarray, budget: int
) -> dict[int, int]:
    """The labels that turn the gradient against v most: for each sample its best class, then the best samples."""
    gains = []
    for n in mine:
        s = v @ X[n]
        s = np.array([0.0, s[0]]) if len(s) == 1 else s
        c = int(s.argmax())
        gains.append((-(s[c] - s[y[n]]), n, c))
    gains.sort()
    return {n: c for gain, n, c in gains[:budget] if gain < 0}


def added(
    theta_scores: np.ndarray, y: np.ndarray, mine: np.ndarray, standing: dict[int, int], threat: dict[str, object]
) -> dict[int, int]:
    """The labels that stand after a round in which all samples are in use and flips stay, by sample.

    `theta_scores` (n, C) are what each label is worth to the attacker.
    """
    budget = math.floor(float(str(threat["budget"])) * len(mine) + 1e-9)
    best = {int(n): int(theta_scores[n].argmax()) for n in mine}
    if threat["memory"] == "persist_total" and threat["unflip"]:
        standing = {}
    elif threat["memory"] == "persist_total":
        budget -= len(standing)
    gains = sorted((theta_scores[n, y[n]] - theta_scores[n, best[n]], n) for n in best if n not in standing)
    after = {n: best[n] for gain, n in gains[: max(0, budget)] if gain < 0}
    if threat["unflip"]:
        return after | {n: best[n] for n in standing if best[n] != y[n]}
    return after | standing


def replay(out: Path, x_train: np.ndarray, y_train: np.ndarray) -> tuple[np.ndarray, list[dict[int, int]]]:
    """theta and the flips of each round, from the folder of a run and its data as loaded."""
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["batch_size"] == "full"
    assert json.loads((out / "summary.json").read_text())["seed"] == config["seed"]
    X = x_train.reshape(len(x_train), -1) / config["dataset"]["scale"]
    X = np.hstack([X, np.ones((len(X), 1))])
    with np.load(out / "partition.npz") as stored:
        mine = np.flatnonzero(np.isin(stored["client"], stored["malicious"]))
    threat, lr, classes = config["attack"], config["lr"], int(y_train.max()) + 1
    target = np.load(out / "target.npz")["theta"] if threat["goal"] == "targeted" else None
    theta = np.zeros((1 if classes == 2 else classes, X.shape[1]))
    flips = []
    for _ in range(config["rounds"]):
        v = softmax_gradient(theta, X, y_train) if target is None else target - theta
        budget = math.floor(threat["budget"] * len(mine) + 1e-9)
        if threat["memory"] == "forget":
            chosen = choose(theta, v, X, y_train, mine, budget)
        else:
            S = X @ v.T if len(v) > 1 else np.hstack([np.zeros((len(X), 1)), X @ v.T])
            chosen = added(S, y_train, mine, flips[-1] if flips else {}, threat)
        y = y_train.copy()
        y[list(chosen)] = list(chosen.values())
        theta = theta - lr * softmax_gradient(theta, X, y)
        flips.append(chosen)
    return theta, flips


def made_flips(out: Path, rounds: int) -> list[dict[int, int]]:
    """The flips of each round that a run reports."""
    with np.load(out / "flips.npz") as stored:
        table = list(zip(*(stored[key].tolist() for key in ("round", "sample", "label")), strict=True))
    return [{sample: label for at, sample, label in table if at == r} for r in range(1, rounds + 1)]
