"""The representation of the paper: a small feed-forward network on the pair (y_i, f_i), with its gradient by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_adalfl.checks import one_of
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.output_gradient import OutputGradient, evaluated, in_chunks
from lightning_adalfl.losses.smooth_leaky_relu import SmoothLeakyReLU

WEIGHT_INITS = ("kaiming_normal", "xavier_uniform")  # as torch.nn.init has them
MAX_CLASSES = 100
EMBEDDING = 4


ACTIVATIONS = {"smooth_leaky_relu": SmoothLeakyReLU, "relu": nn.ReLU, "softplus": nn.Softplus}


class LossNetwork(LearnedLoss):
    """ℓ_φ as a feed-forward network on (y_i, f_i): by default two hidden layers of 40 smooth leaky ReLUs (section 2.2).

    Args:
        task: See :class:`LearnedLoss`.
        hidden: The widths of the hidden layers.
        activation: Of the hidden layers, ``"smooth_leaky_relu"`` (Eq. 4), ``"relu"`` or ``"softplus"``.
        output_activation: Of the output, one of the same names, or ``None``.
        bias: Whether the linear layers have biases.
        weight_init: ``"kaiming_normal"`` or ``"xavier_uniform"``.
        reduction: See :class:`LearnedLoss`.
        sees_classes: For ``"multiclass"``: whether a 4-dimensional embedding of the label's class and one of the
            output's class stand beside (y_i, f_i): fixed codes, and learned changes to them that begin at zero. They
            have no part beyond 100 classes.
        sees_error: For ``"regression"``: whether |f_i - y_i| and its square stand beside (y_i, f_i). A robust loss is
            then near the start, and few trusted rows can find it.

    Raises:
        TypeError: For a switch that is not a bool.
        ValueError: For an unknown name, or a width that is not positive.
    """

    def __init__(
        self,
        task: str,
        hidden: Sequence[int] = (40, 40),
        activation: str = "smooth_leaky_relu",
        output_activation: str | None = None,
        bias: bool = False,
        weight_init: str = "kaiming_normal",
        reduction: str = "mean",
        sees_classes: bool = False,
        sees_error: bool = False,
    ) -> None:
        super().__init__(task, reduction)
        widths = hidden if isinstance(hidden, Sequence) and not isinstance(hidden, str) else ()
        if not widths or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in widths):
            raise ValueError(f"`hidden` must name at least one positive layer width, such as (40, 40); got {hidden}.")
        for name, switch in (("bias", bias), ("sees_classes", sees_classes), ("sees_error", sees_error)):
            if not isinstance(switch, bool):
                raise TypeError(f"`{name}` must be True or False; got {switch!r}.")
        if sees_classes and task != "multiclass":
            raise ValueError(f"`sees_classes` is for task 'multiclass', where an instance has a class; got {task!r}.")
        if sees_error and task != "regression":
            raise ValueError(f"`sees_error` is for task 'regression', where targets are values; got {task!r}.")
        self.hidden = tuple(hidden)
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.output_activation = output_activation
        self.bias = bias
        self.weight_init = one_of("weight_init", weight_init, WEIGHT_INITS)
        self.sees_classes = sees_classes
        self.sees_error = sees_error
        widths = (2 + 2 * sees_error + 2 * EMBEDDING * sees_classes, *hidden, 1)
        self.linear = nn.ModuleList(nn.Linear(*fans, bias=bias) for fans in itertools.pairwise(widths))
        self.between = ACTIVATIONS[activation]()
        one_of("output_activation", activation if output_activation is None else output_activation, ACTIVATIONS)
        self.last = nn.Identity() if output_activation is None else ACTIVATIONS[output_activation]()
        if sees_classes:
            self.label_embedding = nn.Parameter(torch.zeros(MAX_CLASSES, EMBEDDING))
            self.output_embedding = nn.Parameter(torch.zeros(MAX_CLASSES, EMBEDDING))
            self._codes: Tensor
            self.register_buffer("_codes", _class_codes(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw φ afresh: weights by ``weight_init``, biases and embeddings zero."""
        for name, parameter in self.named_parameters():
            fill = f"{self.weight_init}_" if name.endswith("weight") else "zeros_"
            getattr(nn.init, fill)(parameter)

    def inputs(self, p: Tensor, y: Tensor) -> list[Tensor]:
        """Return what the first layer sees of pairs, each of their shape: the prediction is the second."""
        return [y, p, (p - y).abs(), (p - y).square()] if self.sees_error else [y, p]

    def inputs_by_prediction(self, p: Tensor, y: Tensor) -> list[Tensor]:
        """Return the derivative of each of :meth:`inputs` by p."""
        zero, one = torch.zeros_like(p), torch.ones_like(p)
        return [zero, one, (p - y).sign(), 2 * (p - y)] if self.sees_error else [zero, one]

    def start_at_zero(self) -> None:
        """Make the weights of the output zero."""
        for parameter in self.linear[-1].parameters():
            nn.init.zeros_(parameter)

    def tells_apart(self, outputs: int) -> bool:
        """Return whether there are embeddings for so many classes."""
        return self.sees_classes and outputs <= MAX_CLASSES

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ℓ_φ(y_i, f_i) element-wise; where the loss sees classes they are dimension 1."""
        p, y = _rows(prediction), _rows(target)
        value = self.first(p, y)
        for layer in self.linear[1:]:
            value = layer(self.between(value))
        return _from_rows(self.last(value).view_as(p), prediction)

    def first(self, p: Tensor, y: Tensor) -> Tensor:
        """Return the first layer's sums for pairs (R, C), of shape (R · C, width)."""
        layer: nn.Linear = self.linear[0]  # type: ignore[assignment]
        inputs = torch.stack(self.inputs(p, y), dim=-1)
        z = inputs @ layer.weight[:, : inputs.shape[-1]].T
        if self.bias:
            z = z + layer.bias
        classes = p.shape[1]
        if self.tells_apart(classes):
            of_label, of_output = layer.weight[:, 2:].split(EMBEDDING, dim=1)
            of_labels, of_outputs = self.embeddings(classes)
            z = z + (y @ (of_labels @ of_label.T)).unsqueeze(1) + of_outputs @ of_output.T
        return z.view(-1, z.shape[-1])

    def embeddings(self, classes: int) -> tuple[Tensor, Tensor]:
        """Return those of labels and of outputs, each (classes, 4)."""
        of_labels, of_outputs = self._codes[:, :classes]
        return self.label_embedding[:classes] + of_labels, self.output_embedding[:classes] + of_outputs

    def pair_gradient(self, prediction: Tensor, target: Tensor) -> OutputGradient:
        """Return it by hand, for the paper's activation; autograd takes three times as long for so small a network."""
        is_own = type(self).pairwise is LossNetwork.pairwise  # and not that of a subclass
        if is_own and self.activation == "smooth_leaky_relu" and self.output_activation is None:
            return NetworkGradient(self, prediction, target)
        return super().pair_gradient(prediction, target)


LossNetwork.presets = {
    "network": lambda task: LossNetwork(
        task, bias=True, sees_classes=task == "multiclass", sees_error=task == "regression"
    ),
    "paper": partial(LossNetwork, weight_init="xavier_uniform"),
    "ml3": partial(LossNetwork, activation="relu", output_activation="softplus", weight_init="xavier_uniform"),
}


class NetworkGradient(OutputGradient):
    """For a network ``o = wᵀ a_L``, ``a_l = s(z_l)``, ``z_l = W_l a_{l-1} + b_l``, on inputs ``a_0(y, p)``.

    The backward pass is ``f_L = w``, ``e_l = s'(z_l) f_l``, ``f_{l-1} = W_lᵀ e_l``, and the gradient by p is
    ``f_0 · ∂a_0/∂p``. Its product with a tangent p' takes the tangents ``t_l = W_l τ_{l-1}``, ``τ_l = s'(z_l) t_l``
    from ``τ_0 = p' ∂a_0/∂p``, and the adjoints ``q_l = s''(z_l) t_l f_l + s'(z_l) W_{l+1}ᵀ q_{l+1}`` of z_l; then
    ``∂⟨m, p'⟩/∂W_l = Σ (e_l τ_{l-1}ᵀ + q_l a_{l-1}ᵀ)`` over the pairs. The embeddings enter z_1 by a sum.

    Args:
        loss: ℓ_φ.
        prediction: f.
        target: y.
    """

    def __init__(self, loss: LossNetwork, prediction: Tensor, target: Tensor) -> None:
        self._loss = loss
        self._pairs = prediction.detach(), target.detach()
        self._p, self._y = map(_rows, self._pairs)
        # One pass is kept for the second derivative; of several, each is taken again, so that memory does not grow.
        self._kept: _Pass | None = None
        value = torch.empty_like(self._p)
        with torch.no_grad():
            for part, result in self._passes(value):
                result.copy_(part.by_prediction())
        self.value = _from_rows(value, prediction)

    def losses(self) -> Tensor:
        """Return them chunk by chunk."""
        return evaluated(self._loss.pairwise, *self._pairs)

    def _passes(self, others: Tensor) -> Iterator[tuple[_Pass, Tensor]]:
        """Yield the passes through the chunks of the pairs, each with its part of ``others``."""
        for p, y, other in in_chunks(self._p, self._y, others):
            part = self._kept or _Pass(self._loss, p, y)
            self._kept = part if len(p) == len(self._p) else None
            yield part, other

    @torch.no_grad()
    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``."""
        total = {name: torch.zeros_like(p) for name, p in self._loss.phi().items()}
        for part, weight in self._passes(_rows(tangent)):
            for name, gradient in part.by_phi(weight.reshape(-1, 1)).items():
                if name in total:
                    total[name] += gradient
        return total


class _Pass:
    """One pass through the network for pairs (R, C), with what both derivatives share."""

    def __init__(self, loss: LossNetwork, p: Tensor, y: Tensor) -> None:
        self._loss, self._p, self._y = loss, p, y
        self._weights: list[Tensor] = [layer.weight for layer in loss.linear]  # type: ignore[misc]
        self._activation: SmoothLeakyReLU = loss.between
        z = loss.first(p, y)
        self._a: list[Tensor] = []
        self._ds: list[Tensor] = []
        for layer in loss.linear[1:]:
            self._ds.append(self._activation.slope(z))
            if layer is not loss.linear[-1]:
                self._a.append(self._activation(z))
                z = layer(self._a[-1])
        f = self._weights[-1]
        self._f, self._e = [f], [self._ds[-1] * f]
        for weight, ds in zip(reversed(self._weights[1:-1]), reversed(self._ds[:-1])):
            self._f.insert(0, self._e[0] @ weight)
            self._e.insert(0, ds * self._f[0])

    def by_prediction(self) -> Tensor:
        """Return the gradient by p, (R, C)."""
        if not self._loss.sees_error:
            return (self._e[0] @ self._weights[0][:, 1]).view_as(self._p)
        return ((self._e[0] @ self._weights[0]) * self._by_prediction()).sum(1).view_as(self._p)

    def _by_prediction(self) -> Tensor:
        """Return ``∂a_0/∂p``, (R · C, inputs)."""
        parts = self._loss.inputs_by_prediction(self._p, self._y)
        return torch.stack(parts, dim=-1).view(-1, len(parts))

    def by_phi(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return the derivative by φ of the inner product with a tangent (R · C, 1)."""
        first, *middle, _ = self._weights
        start = tangent * self._by_prediction()
        t, tau = [start @ first[:, : start.shape[1]].T], []
        for weight, ds in zip([*middle, None], self._ds):
            tau.append(ds * t[-1])
            if weight is not None:
                t.append(tau[-1] @ weight.T)
        found = {f"linear.{len(self._ds)}.weight": tau[-1].sum(0, keepdim=True)}
        q = self._adjoint(-1, t[-1])
        for k in range(len(middle), 0, -1):
            found[f"linear.{k}.weight"] = (q.T @ self._a[k - 1]).addmm_(self._e[k].T, tau[k - 1])
            found[f"linear.{k}.bias"] = q.sum(0)
            q = self._adjoint(k - 1, t[k - 1]).addcmul_(self._ds[k - 1], q @ self._weights[k])
        found["linear.0.bias"] = q.sum(0)
        inputs = torch.stack(self._loss.inputs(self._p, self._y), dim=-1).view_as(start)
        by_weight = (q.T @ inputs).addmm_(self._e[0].T, start)
        if self._loss.sees_classes:
            by_weight = torch.cat([by_weight, *self._by_embeddings(q.view(*self._p.shape, -1), found)], dim=1)
        return {**found, "linear.0.weight": by_weight}

    def _adjoint(self, k: int, t: Tensor) -> Tensor:
        return self._activation.curvature(self._ds[k]).mul_(t).mul_(self._f[k])

    def _by_embeddings(self, q: Tensor, found: dict[str, Tensor]) -> list[Tensor]:
        """Return the derivatives by what the first layer makes of either embedding; add those by the embeddings.

        Args:
            q: The adjoint of z_1, (R, C, width).
            found: To which they are added.
        """
        classes, parts = self._p.shape[1], self._weights[0][:, 2:].split(EMBEDDING, dim=1)
        if not self._loss.tells_apart(classes):
            return [torch.zeros_like(part) for part in parts]
        by_sum = {"label_embedding": self._y.T @ q.sum(1), "output_embedding": q.sum(0)}  # each (C, width)
        by_part = []
        for (name, adjoint), part, embedding in zip(by_sum.items(), parts, self._loss.embeddings(classes)):
            found[name] = torch.zeros_like(getattr(self._loss, name))
            found[name][:classes] = adjoint @ part
            by_part.append(adjoint.T @ embedding)
        return by_part


def _rows(pairs: Tensor) -> Tensor:
    """Return pairs (N, C, d1, …) as (N · d1 · …, C), and (N,) as (N, 1)."""
    if pairs.ndim == 1:
        return pairs.unsqueeze(1)
    return pairs.movedim(1, -1).reshape(-1, pairs.shape[1])


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_rows`."""
    if like.ndim == 1:
        return rows.squeeze(1)
    return rows.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


def _class_codes() -> Tensor:
    """Return a code of each class as a label and as an output, (2, 100, 4), with entries of size 0.3."""
    # By a formula, so that a saved φ means the same wherever it is loaded; no two classes are alike.
    turns = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19]).double().sqrt().view(2, 1, EMBEDDING)
    classes = torch.arange(1, MAX_CLASSES + 1).double().view(1, -1, 1)
    return (0.3 * 2**0.5 * torch.cos(2 * torch.pi * turns * classes)).float()
