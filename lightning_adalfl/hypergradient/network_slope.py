"""The slope of the paper's loss network, by hand: autograd takes three times as long for so small a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl.hypergradient.loss_slope import LossSlope
from lightning_adalfl.losses.activations import SmoothLeakyReLU
from lightning_adalfl.losses.base import without_autocast
from lightning_adalfl.losses.handcrafted import handcrafted_pairwise
from lightning_adalfl.losses.network import LossNetwork
from lightning_adalfl.losses.pairing import slope_by_output, to_pairs


class NetworkSlope(LossSlope):
    """For a network ``o = wᵀ a_L``, ``a_l = s(z_l)``, ``z_l = W_l a_{l-1} + b_l``, on pairs ``a_0 = (y, p)``.

    With c the weight of a pair in the mean, the backward pass is ``f_L = c w``, ``e_l = s'(z_l) f_l``,
    ``f_{l-1} = W_lᵀ e_l``, and the slope by p is the second entry of ``f_0``. Its contraction with a tangent p' takes
    the tangents ``t_l = W_l τ_{l-1}``, ``τ_l = s'(z_l) t_l`` from ``τ_0 = (0, p')``, and the adjoints
    ``q_l = s''(z_l) t_l f_l + s'(z_l) W_{l+1}ᵀ q_{l+1}`` of z_l; then
    ``∂⟨m, h⟩/∂W_l = Σ (e_l τ_{l-1}ᵀ + q_l a_{l-1}ᵀ)`` over the pairs.

    Args:
        loss: M_φ.
        predictions: f_θ(x).
        target: y.
    """

    def __init__(self, loss: LossNetwork, predictions: Tensor, target: Tensor) -> None:
        linear = [layer for layer in loss.layers if isinstance(layer, nn.Linear)]
        phi = [p for layer in linear for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
        super().__init__(loss, predictions, phi)
        *self._hidden, self._last = linear
        self._activations = [layer for layer in loss.layers if isinstance(layer, SmoothLeakyReLU)]
        self._task = loss.task
        with without_autocast(predictions.device), torch.no_grad():
            raw = predictions.detach().to(self._last.weight.dtype)
            self._paired, paired_target = to_pairs(loss.task, raw, target)
            pairs = self._paired.numel()
            self._weight = 1.0 / (pairs if loss.reduction == "mean" else self._paired.shape[0])
            by_paired, output = self._through(torch.stack((paired_target, self._paired), dim=-1).view(pairs, 2))
            by_paired, output = by_paired.view_as(self._paired), output.view_as(self._paired)
            if loss.residual:
                leaf = self._paired.detach().requires_grad_()
                with torch.enable_grad():
                    handcrafted = handcrafted_pairwise(loss.task, leaf, paired_target)
                    (steepness,) = torch.autograd.grad(handcrafted.sum(), leaf)
                by_paired = by_paired + self._weight * steepness
                output = output + handcrafted.detach()
            self.value = output.sum() * self._weight
            self.slope = slope_by_output(loss.task, self._paired, by_paired).to(predictions.dtype)

    def _through(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope by the paired predictions, (pairs,), and the network's output, (pairs, 1)."""
        self._a = [pairs]
        self._ds: list[Tensor] = []
        for linear, activation in zip(self._hidden, self._activations):
            z = F.linear(self._a[-1], linear.weight, linear.bias)
            share = z.new_tensor(1.0 - activation.gamma).expand_as(z)
            ds = torch.ops.aten.softplus_backward(share, z, activation.beta, 20.0)  # 20 is torch's own threshold
            self._ds.append(ds.add_(activation.gamma))
            self._a.append(F.softplus(z, activation.beta).lerp_(z, activation.gamma))
        f = self._last.weight * self._weight
        self._f = [f]
        self._e: list[Tensor] = []
        for linear, ds in zip(reversed(self._hidden), reversed(self._ds)):
            self._e.insert(0, ds * f)
            if linear is not self._hidden[0]:
                f = self._e[0] @ linear.weight
                self._f.insert(0, f)
        by_paired = self._e[0] @ self._hidden[0].weight[:, 1]
        return by_paired, F.linear(self._a[-1], self._last.weight, self._last.bias)

    def contracted(self, phi: list[Tensor], h: Tensor) -> list[Tensor]:
        """Return ``∂/∂φ ⟨m(φ), h⟩``."""
        with without_autocast(h.device), torch.no_grad():
            tangent = slope_by_output(self._task, self._paired, h.to(self._paired.dtype))
            gradients = self._by_phi(tangent.reshape(-1, 1))
        # A bias of the last layer moves the loss and not its slope.
        return [gradients[id(p)] if id(p) in gradients else torch.zeros_like(p) for p in phi]

    def _by_phi(self, tangent: Tensor) -> dict[int, Tensor]:
        first = self._hidden[0].weight
        t, tau = [tangent * first[:, 1]], []
        for linear, ds in zip([*self._hidden[1:], None], self._ds):
            tau.append(ds * t[-1])
            if linear is not None:
                t.append(tau[-1] @ linear.weight.T)
        gradients = {id(self._last.weight): tau[-1].sum(0, keepdim=True) * self._weight}
        carried: Tensor | None = None
        for k in reversed(range(len(self._hidden))):
            linear, activation, ds = self._hidden[k], self._activations[k], self._ds[k]
            # s'' = β u (1 - u / (1 - γ)) with u = s' - γ.
            above = ds - activation.gamma
            q = torch.addcmul(above, above, above, value=-1.0 / (1.0 - activation.gamma))
            q.mul_(t[k]).mul_(self._f[k] * activation.beta)
            if carried is not None:
                q.addcmul_(ds, carried)
            by_weight = q.T @ self._a[k]
            if k:
                by_weight.addmm_(self._e[k].T, tau[k - 1])
                carried = q @ linear.weight
            else:
                by_weight[:, 1] += (self._e[0].T @ tangent).squeeze(1)
            gradients[id(linear.weight)] = by_weight
            if linear.bias is not None:
                gradients[id(linear.bias)] = q.sum(0)
        return gradients
