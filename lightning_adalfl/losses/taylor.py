"""Taylor polynomials as learned losses, in the two forms that the literature has."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lightning_adalfl.checks import one_of
from lightning_adalfl.losses.learned_loss import LearnedLoss


class TaylorLoss(LearnedLoss):
    """A bivariate Taylor polynomial with eight coefficients, φ0 and φ1 its centre (Table 4).

    With a and b the two variables, the cubic is
    ``φ2(b-φ1) + φ3(b-φ1)²/2 + φ4(b-φ1)³/6 + φ5(a-φ0)(b-φ1) + φ6(a-φ0)(b-φ1)²/2 + φ7(a-φ0)²(b-c)/2``;
    the quadratic leaves out φ4, φ6 and φ7.

    Args:
        task: See :class:`LearnedLoss`.
        order: ``"cubic"`` or ``"quadratic"``.
        form: ``"prediction_powers"`` is TaylorGLO's (Gonzalez & Miikkulainen, 2021): powers of the prediction alone,
            a = y, b = f, c = φ1. ``"target_powers"`` has the roles the other way round, a = f, b = y, c = φ0, as
            published code of the paper's authors does; its quadratic is linear in the prediction and so has no minimum.
        reduction: See :class:`LearnedLoss`.

    Raises:
        ValueError: For an unknown order or form.
    """

    def __init__(
        self, task: str, order: str = "cubic", form: str = "prediction_powers", reduction: str = "mean"
    ) -> None:
        super().__init__(task, reduction)
        self.order = one_of("order", order, ("quadratic", "cubic"))
        self.form = one_of("form", form, ("target_powers", "prediction_powers"))
        self.coefficients = nn.Parameter(torch.empty(8))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw φ afresh from N(0, 0.001²)."""
        nn.init.normal_(self.coefficients, std=1e-3)

    def is_smooth(self) -> bool:
        """Return that a polynomial is."""
        return True

    @torch.no_grad()
    def scale_(self, factor: Tensor | float) -> None:
        """Multiply every coefficient, the centre included."""
        self.coefficients.mul_(factor)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the polynomial's value element-wise."""
        c0, c1, c2, c3, c4, c5, c6, c7 = self.coefficients.unbind()
        by_target = self.form == "target_powers"
        a, b = (prediction, target) if by_target else (target, prediction)
        da, db = a - c0, b - c1
        value = c2 * db + c3 * db**2 / 2 + c5 * da * db
        if self.order == "cubic":
            value = value + c4 * db**3 / 6 + c6 * da * db**2 / 2 + c7 * da**2 * (b - (c0 if by_target else c1)) / 2
        return value


TaylorLoss.presets = {
    "taylor_cubic": TaylorLoss,
    "taylor_quadratic": partial(TaylorLoss, order="quadratic"),
    "taylor_cubic_target_powers": partial(TaylorLoss, form="target_powers"),
    "taylor_quadratic_target_powers": partial(TaylorLoss, order="quadratic", form="target_powers"),
}
