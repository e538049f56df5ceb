"""How good many models are on a set of samples, as `Model.measure` says it of one."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_attack import data
from fl_attack.engine.batches import Batches

LOGITS_AT_ONCE = 2**21


class MeasuredSamples:
    """Samples on the device of minibatches, with the features that these keep, sorted by label."""

    def __init__(self, batches: Batches, x: NDArray[Any], y: NDArray[np.int64]) -> None:
        """`x` (n, p) raw values as of the data set of these batches, `y` (n,) their labels."""
        scale, C = batches.cell.dataset.scaling, batches.cell.classes
        order = np.argsort(y, kind="stable")
        parts = [
            batches.features.drop(data.features(x[at], scale, batches.dtype))
            for at in np.array_split(order, max(1, len(order) // 4096))
        ]
        self.X = torch.cat(parts).to(batches.device)
        self.y = torch.tensor(y[order]).to(batches.device)
        self.zeros, self.classes = int((y == 0).sum()), C

    def quality(self, theta: Tensor) -> NDArray[np.float64]:
        """Accuracy, F1 and mean loss of each theta (M C, d), (M, 3)."""
        C = 1 if self.classes == 2 else self.classes
        cells = max(1, LOGITS_AT_ONCE // (C * len(self.y)))
        measure = self._two if C == 1 else self._several
        return np.concatenate([measure(part).cpu().numpy() for part in theta.split(cells * C)])

    def _two(self, theta: Tensor) -> Tensor:
        """What `quality` gives, (M, 3), for two classes: the first `zeros` samples are of label 0."""
        Z = theta @ self.X.mT
        positive = Z > 0
        false, true = positive[:, : self.zeros].sum(1), positive[:, self.zeros :].sum(1)
        ones = len(self.y) - self.zeros
        f1 = 2 * true / (true + false + ones).clamp(min=1).double()
        Z[:, self.zeros :].neg_()
        loss = functional.softplus(Z).sum(1, dtype=torch.float64)
        return torch.stack([(true + self.zeros - false).double() / len(self.y), f1, loss / len(self.y)], 1)

    def _several(self, theta: Tensor) -> Tensor:
        """What `quality` gives, (M, 3), for several classes, from a confusion matrix for each cell."""
        n, C = len(self.y), self.classes
        Z = (theta @ self.X.mT).view(-1, C, n)
        loss = Z.logsumexp(1) - Z.gather(1, self.y.expand(len(Z), 1, n))[:, 0]
        best, predicted = Z[:, 0].clone(), torch.zeros(len(Z), n, dtype=torch.int64, device=Z.device)
        for c in range(1, C):  # the lowest of equals; several times as fast as argmax over an inner axis
            predicted.masked_fill_(Z[:, c] > best, c)
            torch.maximum(best, Z[:, c], out=best)
        cell = torch.arange(len(Z), device=Z.device)[:, None]
        pair = (cell * C + self.y) * C + predicted
        confusion = torch.bincount(pair.view(-1), minlength=len(Z) * C * C).view(-1, C, C)
        hits = confusion.diagonal(dim1=1, dim2=2).double()
        either = confusion.sum(1) + confusion.sum(2)
        occurs = (either > 0).double()  # in the test set or among what is predicted
        f1 = (2 * hits / either.clamp(min=1)).sum(1) / occurs.sum(1)
        return torch.stack([hits.sum(1) / n, f1, loss.mean(1, dtype=torch.float64)], 1)
