"""A stand-in for the fused Adam of Transformer Engine and Apex, with its state, where neither is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_midus.errors import UserError


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) that keeps ``step`` in the param group, as the FusedAdam of Transformer Engine and Apex do.

    Megatron-Core's distributed optimizer can only reload state that is laid out so. The name says what it stands in
    for; the arithmetic is plain torch.

    Args:
        params: parameters or param groups; gradients must be dense.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient (Loshchilov and Hutter 2019, arXiv 1711.05101) if ``adam_w_mode``,
            else added to it.
        adam_w_mode: see ``weight_decay``.
        bias_correction: divide the moments by ``1 - beta^step`` (Kingma and Ba 2015, arXiv 1412.6980).
        capturable: part of Megatron's contract; this Adam cannot be captured in a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise UserError("an optimizer in a CUDA graph needs the Adam of Transformer Engine, which is not installed")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        learning_rate, gradient = group["lr"], parameter.grad
        assert gradient is not None
        if self.adam_w_mode:
            parameter.mul_(1 - learning_rate * group["weight_decay"])
        elif group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-learning_rate / correction1)


def install_fused_adam() -> None:
    """Makes ``FusedAdam`` the Adam of Megatron-Core's optimizers, where neither Transformer Engine nor Apex is there.

    Without it the distributed optimizer trains but cannot load what it saved.
    """
    import megatron.core.optimizer as factory
    from megatron.core.optimizer import distrib_optimizer

    factory.Adam = FusedAdam
    factory.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    # "TE" as in: the step count is read from and written to the param groups.
    distrib_optimizer.USING_TE_OPTIMIZER = True
