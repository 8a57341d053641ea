"""What kernels that are right one call at a time may still break: compiled graphs, CUDA graphs, streams, devices.

Each check is a function of a device that yields what it compared, the error and its tolerance; ``python -m bench gpu``
runs them in its stage, and ``tests/gpu`` under pytest. On a CPU a graph is the call itself, and streams are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import Thread

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stella_kernels import StellaLinear
from stella_kernels.functional import polar
from stella_kernels.nn import StiefelFactor
from stella_kernels.optim import StellaAdamW
from stella_kernels.reference import adapter as reference

Compared = Iterator[tuple[str, float, float]]  # what, error, tolerance
T, M, N, R = 67, 41, 53, 5  # multiples of nothing
FACTORS = ((N, R), (M, R), (130, 17))


class NotHereError(RuntimeError):
    """What a check needs is not on this machine."""


def relative(value: Tensor, exact: Tensor) -> float:
    """Relative Frobenius distance to ``exact``, NaN where the value is."""
    exact = exact.detach().double().cpu()
    return float((value.detach().double().cpu() - exact).norm() / exact.norm().clamp(min=1e-300))


def tolerance(dtype: torch.dtype) -> float:
    """Five roundings to storage and sums of some fifty terms, as of ``stella_kernels.verification``."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * (torch.finfo(dtype).eps + torch.finfo(arithmetic).eps * max(T, M, N) ** 0.5)


def layer_on(device: torch.device, dropout: float = 0.0, r: int = R, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of odd sizes."""
    return StellaLinear(nn.Linear(N, M, device=device, dtype=dtype), r=r, dropout=dropout).train()


def adapter_gradients(layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the input, and those of U, S and Vt."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return (y, *torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], grad_y))


def compared(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], bound: float) -> Compared:
    """Each of the results of :func:`adapter_gradients`."""
    for name, value, right in zip(("y", "grad x", "grad U", "grad S", "grad Vt"), got, exact, strict=True):
        yield name, relative(value, right), bound


def compiled(device: torch.device) -> Compared:
    """``torch.compile(fullgraph=True)`` gives what eager execution does, forward and backward."""
    layer, x, grad_y = layer_on(device), torch.randn(T, N, device=device), torch.randn(T, M, device=device)
    # inductor compiles C++ for a CPU, for a minute; what is asked there is that the graph is one
    whole = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    yield from compared(
        adapter_gradients(whole, x, grad_y), adapter_gradients(layer, x, grad_y), tolerance(torch.float32)
    )


class Graph:
    """Calls recorded as a CUDA graph after some that warm up, to be replayed; of a CPU, called anew."""

    def __init__(self, device: torch.device, run: Callable[[], object]) -> None:
        self._run = run
        self._graph = None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run()

    def replay(self) -> None:
        """Once more, on what its memory holds now."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()


def graphed_layer(device: torch.device) -> Compared:
    """A CUDA graph of a layer's forward and backward, replayed on other input."""
    layer = layer_on(device)
    x, grad_y = torch.randn(T, N, device=device), torch.randn(T, M, device=device)
    kept: list[Tensor] = []

    def run() -> None:
        results = adapter_gradients(layer, x, grad_y)
        if not kept:
            kept.extend(torch.full_like(result, torch.nan) for result in results)
        torch._foreach_copy_(kept, [result.detach() for result in results])

    graph = Graph(device, run)
    for _ in times(device):
        x.copy_(torch.randn_like(x))
        grad_y.copy_(torch.randn_like(grad_y))
        graph.replay()
        yield from compared(tuple(kept), adapter_gradients(layer, x, grad_y), tolerance(torch.float32))


def times(device: torch.device) -> range:
    """How often something is repeated; an interpreter takes seconds for each."""
    return range(3 if device.type == "cuda" else 1)


def factors_on(device: torch.device) -> list[Tensor]:
    """Orthonormal factors, (n, r), each second one stored by columns."""
    shapes = FACTORS if device.type == "cuda" else FACTORS[:2]
    made = [torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q.float() for shape in shapes]
    return [(Y.mT.contiguous().mT if i % 2 else Y.contiguous()).to(device) for i, Y in enumerate(made)]


class Step:
    """The optimizer step as an operator, and in float64 beside it."""

    def __init__(self, device: torch.device) -> None:
        self.factors = factors_on(device)
        self.gradients = [torch.zeros_like(Y) for Y in self.factors]
        self.moments = [[torch.zeros_like(Y) for Y in self.factors] for _ in range(2)]
        self.couplings = [Y.new_empty(0) for Y in self.factors]
        rows = [[1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 1.0]] * len(self.factors)
        self.settings = torch.tensor(rows, dtype=torch.float64)

    def tensors(self) -> list[Tensor]:
        return [*self.factors, *self.moments[0], *self.moments[1]]

    def __call__(self) -> Tensor:
        """One step on the gradients as they are."""
        return torch.ops.stella_kernels.stella_adamw_(
            self.factors, self.gradients, *self.moments, self.couplings, self.settings
        )

    def exact(self) -> list[Tensor]:
        """What the step would make of factors and moments, by the reference in float64 on the CPU."""
        from stella_kernels.operators.fallback import REFERENCE

        lists = [[t.detach().cpu().double() for t in group] for group in (self.factors, self.gradients, *self.moments)]
        REFERENCE["stella_adamw_"](*lists, [Y.new_empty(0) for Y in lists[0]], self.settings)
        return [*lists[0], *lists[2], *lists[3]]


def graphed_step(device: torch.device) -> Compared:
    """A CUDA graph of the optimizer's operator, replayed on other gradients, each time against float64."""
    step = Step(device)
    for gradient in step.gradients:
        gradient.normal_()
    graph = Graph(device, step)
    for _ in times(device):
        for gradient in step.gradients:
            gradient.copy_(torch.randn_like(gradient))
        exact = step.exact()
        graph.replay()
        yield from _of_step(step, exact)


def _of_step(step: Step, exact: list[Tensor]) -> Compared:
    for index, (value, right) in enumerate(zip(step.tensors(), exact, strict=True)):
        yield f"{('factor', 'exp_avg', 'exp_avg_sq')[index // len(step.factors)]}", relative(value, right), 1e-5


def moved_gradients(device: torch.device) -> Compared:
    """Gradients that come to lie elsewhere at every step, as ``zero_grad`` has them, and memory that is freed."""
    step = Step(device)
    for size in (3, 1000, 7)[: len(times(device)) + 1]:
        freed = torch.full((size, 1000), torch.nan, device=device)  # to be met again by what comes after it
        step.gradients = [torch.randn(Y.shape, device=device).mT.contiguous().mT for Y in step.factors]
        del freed
        exact = step.exact()
        step()
        yield from _of_step(step, exact)


def _stream(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def two_streams(device: torch.device) -> Compared:
    """Layers and steps on two streams at the same time, against the same one after the other."""
    yield from _two_at_once(device, threads=False)


def two_threads(device: torch.device) -> Compared:
    """The same from two threads of Python, each with a stream of its own."""
    yield from _two_at_once(device, threads=True)


def _two_at_once(device: torch.device, threads: bool) -> Compared:
    layers = [layer_on(device) for _ in range(2)]
    steps = [Step(device) for _ in range(2)]
    data = [(torch.randn(T, N, device=device), torch.randn(T, M, device=device)) for _ in range(2)]
    for step in steps:
        for gradient in step.gradients:
            gradient.normal_()
    exact = [step.exact() for step in steps]
    right = [adapter_gradients(layer, *given) for layer, given in zip(layers, data, strict=True)]
    got: dict[int, tuple[Tensor, ...]] = {}
    _wait(device)

    def work(i: int) -> None:
        with _stream(device):
            for _ in times(device):
                got[i] = adapter_gradients(layers[i], *data[i])
            steps[i]()

    if threads:
        workers = [Thread(target=work, args=(i,)) for i in range(2)]
        for worker in workers:
            worker.start()
            if device.type == "cpu":  # Triton's interpreter knows one thread at a time
                worker.join()
        for worker in workers:
            worker.join()
    else:
        work(0)
        work(1)
    _wait(device)
    for i in range(2):
        if i not in got:  # its thread ended in an error, which it has printed
            yield f"stream {i}", float("nan"), 0.0
            continue
        yield from compared(got[i], right[i], tolerance(torch.float32))
        yield from _of_step(steps[i], exact[i])


def second_device(device: torch.device) -> Compared:
    """All of it on another GPU than torch's current one."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotHereError("there is one GPU")
    other = torch.device("cuda", 1) if device.type == "cuda" else device
    yield from against_float64(other)
    step = Step(other)
    for gradient in step.gradients:
        gradient.normal_()
    exact = step.exact()
    step()
    yield from _of_step(step, exact)
    matrix = torch.randn(M, R, device=other)
    yield "polar", relative(polar(matrix), polar(matrix.double().cpu())), 1e-5


def against_float64(device: torch.device) -> Compared:
    """A layer without dropout, forward and backward, beside the formula in float64."""
    for r in (1, R):
        layer = layer_on(device, r=r)
        x, grad_y = torch.randn(T, N, device=device), torch.randn(T, M, device=device)
        yield from compared(
            adapter_gradients(layer, x, grad_y), exact_gradients(layer, x, grad_y), tolerance(torch.float32)
        )


def exact_gradients(layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """Of :func:`adapter_gradients`, in float64 on the CPU."""
    x, grad_y = x.detach().double().cpu(), grad_y.double().cpu()
    factors = [getattr(layer, name).detach().double().cpu() for name in ("U", "S", "Vt")]
    W, b = (parameter.detach().double().cpu() for parameter in layer.base.parameters())
    term, _ = reference.adapter_forward(x, *factors, layer.scale, 0.0, None)
    grads = reference.adapter_backward(grad_y, x, *factors, layer.scale, 0.0, None)
    return x @ W.mT + b + term, grad_y @ W + grads[0], *grads[1:]


def checkpointed(device: torch.device) -> Compared:
    """Activation checkpointing draws the same dropout twice: gradients as without it."""
    layer = layer_on(device, dropout=0.3)
    x, grad_y = torch.randn(T, N, device=device), torch.randn(T, M, device=device)

    def again(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    again.parameters = layer.parameters  # type: ignore[attr-defined]
    results = []
    for run in (layer, again):
        torch.manual_seed(11)
        results.append(adapter_gradients(run, x, grad_y))  # type: ignore[arg-type]
    yield from compared(results[1], results[0], tolerance(torch.float32))


def autocast(device: torch.device) -> Compared:
    """Under autocast to float16 and bfloat16, beside float64."""
    # Triton's interpreter cuts off to bfloat16 where a chip rounds
    for dtype in (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,):
        layer = layer_on(device)
        x, grad_y = torch.randn(T, N, device=device), torch.randn(T, M, device=device)
        with torch.autocast(device.type, dtype):
            got = adapter_gradients(layer, x, grad_y.to(dtype))
        exact = exact_gradients(layer, x, grad_y)
        yield from ((f"{name}, {dtype}", *rest) for name, *rest in compared(got, exact, tolerance(dtype)))  # type: ignore[misc]


def repeats(device: torch.device) -> Compared:
    """The same call gives the same bits."""
    layer, x, grad_y = layer_on(device), torch.randn(T, N, device=device), torch.randn(T, M, device=device)
    first = adapter_gradients(layer, x, grad_y)
    for _ in times(device):
        yield from compared(adapter_gradients(layer, x, grad_y), first, 0.0)


def trains(device: torch.device) -> Compared:
    """Some steps of ``StellaAdamW`` on a layer: the loss falls and the factors stay orthonormal."""
    layer = layer_on(device, dropout=0.1)
    optimizer = StellaAdamW(layer, lr=1e-2, grad_scaling=False)
    x, target = torch.randn(T, N, device=device), torch.randn(T, M, device=device)
    losses = []
    for _ in range(10 if device.type == "cuda" else 2):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    yield "loss after over before, at most 1", losses[-1] / losses[0], 1.0
    for factor in (StiefelFactor(layer.U, False, "U"), StiefelFactor(layer.Vt, True, "Vt")):
        Y = factor.view.detach().double()
        identity = torch.eye(Y.shape[1], dtype=torch.float64, device=device)
        yield f"orthonormality of {factor.name}", float((Y.mT @ Y - identity).norm()), 1e-5


CHECKS: tuple[Callable[[torch.device], Compared], ...] = (
    *(against_float64, trains, graphed_step, graphed_layer, moved_gradients, two_streams, two_threads),
    *(checkpointed, autocast, repeats, second_device, compiled),
)
