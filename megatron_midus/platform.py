"""The only place that knows whether this is CUDA over NCCL or a CPU over Gloo. Importing it changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import logging
import os
import platform as host
import time
import uuid
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal

import torch

from megatron_midus.errors import UserError

CPU = torch.device("cpu")

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "scalar_tensor",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

_mapping_active = False


# -- where we run ----------------------------------------------------------------------------------------------------
def is_cpu() -> bool:
    """Whether models of this process live on the CPU."""
    return _mapping_active or not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def cpu_multiplies_bf16() -> bool:
    """Whether torch has fast bf16 products for this processor; without AVX-512 it adds them up in plain loops on x86."""
    is_x86 = host.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def transformer_engine_available() -> bool:
    """Whether Transformer Engine's torch part is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def apex_available() -> bool:
    """Whether NVIDIA Apex with its optimizers is installed."""
    # The package index carries an unrelated project named apex; only NVIDIA's has apex.optimizers.
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None


def require_transformer_engine() -> None:
    """Raises ``ValueError`` with what to install when Transformer Engine cannot be used."""
    if not torch.cuda.is_available():
        raise UserError("Transformer Engine needs a CUDA device and there is none; choose --transformer-impl local")
    if not transformer_engine_available():
        raise UserError(
            "Transformer Engine is not installed; pip install 'megatron-midus[gpu]' "
            "(or 'transformer-engine[pytorch]'), or choose --transformer-impl local"
        )


def require_apex() -> None:
    """Raises ``ValueError`` with how to build it when NVIDIA Apex is missing."""
    if not apex_available():
        raise UserError(
            "NVIDIA Apex is not installed, and the package index has an unrelated project under that name: build it "
            "with git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
            "-v --no-build-isolation ."
        )


# -- process group ---------------------------------------------------------------------------------------------------
def initialize_distributed(backend: Literal["nccl", "gloo"], *, timeout_minutes: float = 10) -> None:
    """Starts ``torch.distributed`` from torchrun's environment, or for one process when there is none.

    Args:
        backend: ``gloo`` runs on the CPU and calls ``activate_cpu_mapping``; ``nccl`` takes GPU ``LOCAL_RANK``.
        timeout_minutes: how long a collective may wait for the other ranks.

    Raises:
        ValueError: a backend that cannot run here, or a torchrun environment that is incomplete.
    """
    if backend not in ("nccl", "gloo"):
        raise UserError(f"distributed backend {backend!r} is not known; choose nccl or gloo")
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing and not alone:
        raise UserError(f"the environment lacks {', '.join(missing)}; start the program with torchrun")
    if backend == "gloo":
        activate_cpu_mapping()
    else:
        _select_gpu()
    if not (transformer_engine_available() or apex_available()):
        install_fused_adam()
    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if alone:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout
    )
    fresh = torch.distributed.PrefixStore(name_of_this_start(store, rank, world_size, timeout), store)
    torch.distributed.init_process_group(backend, store=fresh, rank=rank, world_size=world_size, timeout=timeout)


def name_of_this_start(store: Any, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """A name that exactly the processes of this start of a job share.

    torchrun keeps its store when it starts ranks again, with the addresses of the dead ones in it; a rank that connects
    to those fails or hangs. Its count of restarts does not tell starts apart either: launchers of several hosts count
    each for itself. So rank 0 draws a name, and hands it to whoever says hello under a name of its own drawing; it is
    done when all have taken it, which the dead cannot.

    Args:
        store: that all processes reach.
        timeout: until the last process has come.

    Raises:
        ValueError: a process that does not come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"hello/{rank}", own)
    name = own if rank == 0 else ""
    missing = set(range(1, world_size)) if rank == 0 else {0}
    while missing:
        if time.monotonic() > deadline:
            raise UserError(f"rank {rank} waited {timeout} for ranks {sorted(missing)}, which never started")
        if rank == 0:
            for other in missing:
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            missing = {other for other in missing if not store.check([f"taken/{own}/{other}"])}
        elif store.check([f"welcome/{own}"]):
            name, missing = store.get(f"welcome/{own}").decode(), set()
            store.set(f"taken/{name}/{rank}", "")
        time.sleep(0.005 if missing else 0)
    return name


def check_backend(backend: Literal["nccl", "gloo"]) -> None:
    """Raises ``ValueError`` for a backend that cannot run on this machine; changes nothing."""
    if backend == "gloo":
        if not _mapping_active:
            _refuse_cpu_mapping_beside_cuda()
        return
    if not torch.cuda.is_available():
        raise UserError("backend nccl needs a CUDA device and there is none; choose --distributed-backend gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank} but this machine has {torch.cuda.device_count()} CUDA devices; "
            "start at most one process per device"
        )


def _select_gpu() -> None:
    check_backend("nccl")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def _refuse_cpu_mapping_beside_cuda() -> None:
    if torch.cuda.is_available():
        raise UserError(
            "the CPU mapping (backend gloo) is refused where CUDA is available; choose --distributed-backend nccl, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )


# -- Megatron-Core without CUDA --------------------------------------------------------------------------------------
def activate_cpu_mapping() -> None:
    """Makes the ``cuda`` calls of Megatron-Core act on the CPU, for this process and the threads in it.

    Functions are replaced, not a ``TorchFunctionMode`` pushed: a mode is off in other threads and inside
    ``backward()``. A second call does nothing.

    Raises:
        ValueError: when CUDA is available, because real GPU calls would be redirected.
    """
    global _mapping_active
    if _mapping_active:
        return
    _refuse_cpu_mapping_beside_cuda()
    # Before anything is replaced: its decorators import torch._dynamo, which indexes torch's functions by identity.
    from megatron.core.tensor_parallel import random

    _mapping_active = True
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _with_cpu_device(getattr(torch.Tensor, name)))
    _map_tensor_methods()
    _map_cuda_namespace()
    _map_megatron_random(random)
    _map_average()


def _cpu_for_cuda(value: Any) -> Any:
    """``"cpu"`` for whatever names a CUDA device (string, ``torch.device``, ordinal); anything else unchanged."""
    if isinstance(value, str):
        return CPU if value.split(":")[0] == "cuda" else value
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, int) and not isinstance(value, bool):
        return CPU
    return value


def _with_cpu_device(function: Callable) -> Callable:
    @functools.wraps(function)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning needs the CUDA driver
        return function(*args, **kwargs)

    return mapped


def _map_tensor_methods() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_cpu_for_cuda(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        # Megatron's optimizers compare with 'torch.cuda.FloatTensor'.
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to  # type: ignore[method-assign]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class _Stream:
    """Stands in for a CUDA stream where everything runs in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    """Stands in for a CUDA event; always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _map_cuda_namespace() -> None:
    stream = _Stream()

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    replacements: dict[str, Any] = {
        # A device, not an ordinal: Megatron hands it to `device=` everywhere.
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": lambda *args, **kwargs: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, replacements[name])


def _map_megatron_random(random: ModuleType) -> None:
    """Megatron's tracker swaps generator states; here the CPU generator is the one that it swaps."""

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # That the CPU generator moves inside a fork is what the mapping is for; upstream warns of it every time.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _map_average() -> None:
    """Makes a mean over ranks of a sum: older Gloo backends refuse ``ReduceOp.AVG``, and some that followed divide
    wrongly without a word (https://github.com/pytorch/pytorch/issues/162338)."""
    original = torch.distributed.all_reduce

    @functools.wraps(original)
    def all_reduce(
        tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != torch.distributed.ReduceOp.AVG:
            return original(tensor, op, group, async_op)
        assert not async_op, "the sum is to be divided after it has arrived"
        original(tensor, torch.distributed.ReduceOp.SUM, group)
        tensor.div_(torch.distributed.get_world_size(group))
        return None

    torch.distributed.all_reduce = all_reduce


# -- optimizer -------------------------------------------------------------------------------------------------------
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


def describe() -> str:
    """Versions and devices that this environment has, one a line."""
    import importlib.metadata

    names = ("megatron-midus", "megatron-core", "torch", "transformers", "transformer-engine", "apex", "triton")
    lines = []
    for name in names:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} -")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines += [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)] or ["no CUDA device"]
    return "\n".join(lines)


if __name__ == "__main__":
    import megatron.core  # noqa: F401  an environment in which this fails cannot train

    print(describe())
