"""An emulated GPU: the CUDA paths of the project run, and are checked, on a machine without one.

    with fake_gpu.emulated() as gpu:
        ...  # a script with --gpu-devices 1
    assert not gpu.of(fake_gpu.WAIT)

A `DeviceTensor` has its values on the CPU and everything else, the device included, of a CUDA tensor. PyTorch therefore
takes the paths of CUDA (autograd, autocast, fused optimizers, `if x.is_cuda`), and each operation comes here before it
is computed on the CPU. It is compared with the rules of CUDA. What breaks one is reported, with the innermost line of
the project that caused it:

- WAIT: the host waits for the device. It reads a value, needs the size of a result (a boolean index, `nonzero`,
  `unique`), copies without `non_blocking`, or synchronizes.
- PAGEABLE: an asynchronous copy from or to memory that is not pinned. CUDA may wait in it.
- MIXED: an operation on tensors of two devices. It also raises an exception, as CUDA does.
- RACE: a stream uses memory that another one still writes or is free to reuse, or the host reads memory that is still
  being copied to.

There are two GPUs, of which the project is given the second, and a new thread starts on the first, as with CUDA. Code
that assumes a single GPU therefore mixes devices.

What it proves, for the code that a test runs: none of the above happens, and the values are those of the CPU.

What it cannot prove: the values, speed, memory and determinism of CUDA's kernels; NCCL; torch.compile and CUDA graphs;
waits inside of CUDA's libraries, of its allocator and of a few operators. Of streams it knows what the host has queued,
and it misses memory that is overwritten while another stream reads it. `backward` follows the graph of autograd without
its hooks, so DistributedDataParallel does not work. cuDNN is off, because the CPU has none of its kernels.
"""

import contextlib
import functools
import heapq
import inspect
import itertools
import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
HOST, DEVICE, COUNT = torch.device('cpu'), torch.device('cuda', 1), 2
MEMORY = 1 << 34  # bytes of a GPU
POSSIBLE = hasattr(torch._C, '_ensureCUDADeviceGuardSet')  # without it, as in PyTorch 2.8, a device must be there
WAIT, PAGEABLE, MIXED, RACE = 'wait', 'pageable', 'mixed', 'race'

READ_VALUES = {'equal', 'is_nonzero', 'histc'}  # besides operations that PyTorch tags as such
COPIES = {'_to_copy', 'copy_'}
INDEXING = {'index', '_unsafe_index', 'index_put', 'index_put_', '_index_put_impl_'}
# They take a 0-dim CPU tensor as a number, besides operations that PyTorch tags as pointwise.
TAKE_NUMBERS = {'fill', 'fill_', 'masked_fill', 'masked_fill_', 'index_fill', 'index_fill_'}


class Line(NamedTuple):
    """A line of the project that was being executed."""

    path: str  # below the root of the project
    number: int
    function: str

    def __str__(self) -> str:
        text = linecache.getline(str(ROOT / self.path), self.number).strip()
        return f'{self.path}:{self.number} in {self.function}: {text}'


@dataclass(frozen=True)
class Report:
    """A rule that was broken, and the lines of the project that led there, innermost first."""

    kind: str
    what: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return f'{self.kind}: {self.what}, at {self.lines[0] if self.lines else "no line of the project"}'


@functools.cache
def path_in_project(filename: str) -> str | None:
    """The path below the root; None for the tests and for what is installed below the root, as in .venv."""
    path = Path(filename).resolve()
    if path.suffix != '.py' or not path.is_relative_to(ROOT):
        return None
    path = path.relative_to(ROOT)
    return None if path.parts[0] == 'tests' or 'site-packages' in path.parts else str(path)


def project_lines(frame: FrameType | None) -> Iterator[Line]:
    """The lines of the project that led to `frame`, innermost first."""
    while frame:
        if path := path_in_project(frame.f_code.co_filename):
            yield Line(path, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


class Stream:
    """A queue of operations, which `clock` counts. `seen` has the clocks of the streams that it has waited for."""

    def __init__(self, gpu: 'Gpu', device: Any = None, **_):
        self.gpu, self.device = gpu, gpu.full('cuda' if device is None else device)
        self.clock, self.seen = 0, {}

    def is_after(self, stream: 'Stream', clock: int) -> bool:
        """Whether what is queued from now on comes after the first `clock` operations of `stream`."""
        return stream is self or self.seen.get(stream, 0) >= clock

    def wait_stream(self, other: 'Stream') -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: 'Event') -> None:
        for stream, clock in event.after.items():
            self.seen[stream] = max(clock, self.seen.get(stream, 0))

    def record_event(self, event: 'Event | None' = None) -> 'Event':
        event = event or Event(self.gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu.wait('synchronizes a stream', self.record_event())

    def is_capturing(self) -> bool:
        return False


class Event:
    """A place in a stream. `after` has the clocks, of it and of those that it has waited for, at this place."""

    def __init__(self, gpu: 'Gpu', *_, **__):
        self.gpu, self.after = gpu, {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current_stream()
        self.after = {**stream.seen, stream: stream.clock}

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.after:
            self.gpu.wait('synchronizes an event', self)


@dataclass(eq=False)
class Memory:
    """What the views of a tensor share: the stream it was allocated on, its last writer, and `record_stream`."""

    owner: Stream
    writer: Stream
    clock: int  # of the writer
    users: set[Stream] = field(default_factory=set)


class DeviceTensor(Tensor):
    """A tensor of a GPU; `host` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, gpu: 'Gpu', host: Tensor, device: torch.device, memory: Memory) -> 'DeviceTensor':
        tensor = Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device=device
        )
        tensor.gpu, tensor.host, tensor.memory = gpu, host, memory
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        gpu = next(tensor.gpu for tensor in tensors_of((args, kwargs)) if isinstance(tensor, DeviceTensor))
        return gpu.compute(func, args, kwargs or {})

    # What Tensor does without an operation, or refuses to do for a subclass

    def record_stream(self, stream: Stream) -> None:
        self.memory.users.add(stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def numpy(self, **_) -> None:
        self.gpu.report(MIXED, 'numpy() of a CUDA tensor')
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_, **__) -> None:
        self.numpy()

    def __reduce_ex__(self, protocol: int) -> Any:
        self.gpu.wait('saves a tensor', self.gpu.current_stream(self.device).record_event())
        return self.host.__reduce_ex__(protocol)


class Gpu:
    """The emulation: its `reports`, in order, how often each operation ran on a GPU, and the bytes `sent` there."""

    def __init__(self):
        self.reports: list[Report] = []
        self.operations: Counter[str] = Counter()
        self.sent = 0
        self.thread = threading.local()  # its current device and stream
        self.streams = [Stream(self, torch.device('cuda', index)) for index in range(COUNT)]  # the default ones
        self.pinned: dict[int, Any] = {}  # address -> storage; while it is held here no other has this address
        self.arriving: dict[int, tuple[Stream, int]] = {}  # address of host memory -> the copy to it

    def of(self, *kinds: str) -> list[Report]:
        return [report for report in self.reports if report.kind in kinds]

    def report(self, kind: str, what: str) -> Report:
        report = Report(kind, what, tuple(project_lines(sys._getframe(1))))
        self.reports.append(report)
        return report

    def wait(self, what: str, event: Event) -> None:
        """Report that the host waits for an event. The copies before it have then arrived."""
        self.report(WAIT, what)
        self.arriving = {
            at: (stream, clock) for at, (stream, clock) in self.arriving.items() if event.after.get(stream, -1) < clock
        }

    def refuse(self, what: str) -> None:
        raise RuntimeError(f'Expected all tensors to be on the same device; {self.report(MIXED, what)}')

    # The functions of torch.cuda

    def current_device(self) -> int:
        return getattr(self.thread, 'device', 0)

    def set_device(self, device: Any) -> None:
        self.thread.device = self.full(device).index

    def full(self, device: Any) -> torch.device:
        """The device with its index, which 'cuda' leaves to the thread."""
        device = torch.device('cuda', device) if isinstance(device, int) else torch.device(device)
        return torch.device('cuda', self.current_device()) if device == torch.device('cuda') else device

    def current_stream(self, device: Any = 'cuda') -> Stream:
        device = self.full('cuda' if device is None else device)
        stream = getattr(self.thread, 'stream', None)
        return stream if stream and stream.device == device else self.streams[device.index]

    @contextlib.contextmanager
    def streaming(self, stream: Stream | None) -> Iterator[None]:
        before = getattr(self.thread, 'stream', None)
        self.thread.stream = stream or before
        try:
            yield
        finally:
            self.thread.stream = before

    def synchronize(self, device: Any = 'cuda') -> None:
        device = self.full('cuda' if device is None else device)
        event = Event(self)
        event.after = {stream: stream.clock for stream, _ in self.arriving.values() if stream.device == device}
        self.wait('synchronizes a device', event)

    # Operations

    def compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Check an operation, and compute it on the CPU."""
        kwargs = dict(kwargs)
        pin, device = kwargs.pop('pin_memory', False), kwargs.get('device')
        device = device if device is None else self.full(device)
        given = list(tensors_of((args, kwargs)))
        if (device or HOST).type == 'cuda' or any(isinstance(tensor, DeviceTensor) for tensor in given):
            return self._on_gpu(func, args, kwargs, given, device)
        return self._on_host(func, args, kwargs, given, pin)

    def _on_host(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor], pin: bool) -> Any:
        name = func.overloadpacket.__name__
        if name == 'is_pinned':
            return address(args[0]) in self.pinned
        if not effects(func).is_view:
            self.check_arrival(name, given)
        if name == '_pin_memory':
            return self._pin(args[0].clone())
        result = func(*args, **kwargs)
        return self._pin(result) if pin else result

    def check_arrival(self, name: str, tensors: Iterable[Tensor]) -> None:
        if self.arriving and any(address(tensor) in self.arriving for tensor in tensors):
            self.report(RACE, f'{name} of memory of the host that may still be copied to')

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned[address(tensor)] = tensor.untyped_storage()
        return tensor

    def _on_gpu(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor], device: torch.device | None) -> Any:
        name, effect = func.overloadpacket.__name__, effects(func)
        mine = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
        written = list(tensors_of(effect.written(args, kwargs)))
        device = written[0].device if written else device or mine[0].device  # of the result
        stream = self.current_stream(device if device.type == 'cuda' else mine[0].device)
        self.operations[name] += 1
        if mine and name not in COPIES and (reason := self._check(func, name, args, given, mine, written)):
            self.wait(reason, stream.record_event())
        if not effect.is_view:
            stream.clock += 1
            for memory in {tensor.memory for tensor in mine}:
                self._use(name, memory, stream)

        if 'device' in kwargs:
            kwargs['device'] = HOST
        result = func(*mapped(on_host, args), **mapped(on_host, kwargs))

        if name in COPIES:
            self._copy(name, args, kwargs, result, device, stream)
        for tensor in written:
            if isinstance(tensor, DeviceTensor):
                tensor.memory.writer, tensor.memory.clock = stream, stream.clock
                if (tensor.host.size(), tensor.host.stride()) != (tensor.size(), tensor.stride()):
                    raise NotImplementedError(f'{name} changes the shape of a tensor in place')
        return self._wrapped(result, given, device, stream)

    def _wrapped(self, result: Any, given: list[Tensor], device: torch.device, stream: Stream) -> Any:
        """The tensors of a result. An argument is returned as such; a view shares the memory of its base."""

        def wrap(tensor: Tensor) -> Tensor:
            known = next((one for one in given if on_host(one) is tensor), None)
            if known is not None or device == HOST:
                return tensor if known is None else known
            at = address(tensor)
            bases = (one.memory for one in given if isinstance(one, DeviceTensor) and address(one.host) == at)
            memory = next(bases, None) or Memory(stream, stream, stream.clock)
            return DeviceTensor(self, tensor, device, memory)

        return mapped(wrap, result)

    def _copy(self, name: str, args: tuple, kwargs: dict, result: Any, device: torch.device, stream: Stream) -> None:
        """Report a copy between the host and a GPU, if it has to be."""
        target, source = (result, args[0]) if name == '_to_copy' else args[:2]
        non_blocking = kwargs.get('non_blocking', name == 'copy_' and len(args) > 2 and args[2])
        fetched = device == HOST
        if not fetched and source.device != HOST:
            return
        host, where = (target, 'to the host') if fetched else (source, 'to the GPU')
        self.sent += 0 if fetched else host.nbytes
        if fetched and non_blocking and name == '_to_copy':
            self._pin(host)  # PyTorch takes pinned memory for the result
        if not non_blocking:
            self.wait(f'copies {where} without non_blocking', stream.record_event())
        elif host.numel() and address(host) not in self.pinned:
            self.report(PAGEABLE, f'{host.nbytes} bytes {where}')
        elif fetched:
            self.arriving[address(host)] = stream, stream.clock

    def _use(self, name: str, memory: Memory, stream: Stream) -> None:
        if memory.owner.device != stream.device:  # a copy from another GPU, for which PyTorch waits
            return
        if not stream.is_after(memory.writer, memory.clock):
            self.report(RACE, f'{name} on a stream that does not wait for the one that writes the memory')
        if memory.owner is not stream and stream not in memory.users:
            self.report(RACE, f'{name} on a stream that record_stream does not name')

    def _check(self, func: Any, name: str, args: tuple, given: list, mine: list, written: list) -> str | None:
        """Refuse to mix devices where CUDA does; say why the host waits for the operation, if it does."""
        if len({tensor.device for tensor in mine}) > 1:
            self.refuse(f'{name} of tensors on {" and ".join(sorted({str(tensor.device) for tensor in mine}))}')
        if name in INDEXING:
            return self._check_indexing(name, *args)
        numbers = torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS
        for tensor in given:
            if tensor.device == HOST and (tensor.ndim or not numbers or any(tensor is one for one in written)):
                self.refuse(f'{name} of tensors on {mine[0].device} and a CPU tensor of shape {tuple(tensor.shape)}')
        if torch.Tag.dynamic_output_shape in func.tags:
            return f'{name} needs to know the size of its result'
        return f'{name} reads a value' if torch.Tag.data_dependent_output in func.tags or name in READ_VALUES else None

    def _check_indexing(self, name: str, indexed: Tensor, indices: Iterable, value: Any = None, *_) -> str | None:
        indices = [index for index in indices if index is not None]
        if indexed.device == HOST:
            self.refuse(f'{name} of a CPU tensor')
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        from_host = value is not None and value.device == HOST
        fills = from_host and value.numel() == 1 and len(masks) == len(indices) == 1  # is done as masked_fill_
        if from_host and value.ndim and not fills:
            self.refuse(f'{name} with values on the CPU')
        if any(index.device == HOST for index in indices):
            return f'{name} by a CPU tensor'
        if masks and not fills:
            return f'{name} by a mask'
        return f'{name} with a value on the CPU' if from_host and not fills else None


class Effect(NamedTuple):
    """What an operation does to its arguments."""

    is_view: bool  # it touches no memory
    positions: tuple[int, ...]  # of the arguments that it writes to
    names: tuple[str, ...]

    def written(self, args: tuple, kwargs: dict) -> list:
        return [args[at] for at in self.positions if at < len(args)] + [kwargs.get(name) for name in self.names]


@functools.cache
def effects(func: Any) -> Effect:
    arguments = func._schema.arguments
    aliases = [argument.alias_info for argument in arguments]
    writes = [alias is not None and alias.is_write for alias in aliases]
    is_view = not any(writes) and any(alias is not None for alias in aliases)
    positions = [at for at, argument in enumerate(arguments) if writes[at] and not argument.kwarg_only]
    names = [argument.name for at, argument in enumerate(arguments) if writes[at]]
    return Effect(is_view, tuple(positions), tuple(names))


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(branch)


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with the function's value for each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(function, branch) for key, branch in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([mapped(function, branch) for branch in tree])
    return tree


def on_host(tensor: Tensor) -> Tensor:
    """The values of any tensor, on the CPU; this is not reported."""
    return tensor.host if isinstance(tensor, DeviceTensor) else tensor


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """Hands each operation of its thread to the GPU."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpu.compute(func, args, kwargs or {})


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """What torch.autograd.backward does. PyTorch's own engine would ask CUDA for streams.

    Nodes are visited from the newest to the oldest, as there, so gradients add up in the same order.
    """
    counter, queue, received = itertools.count(), [], {}

    def receive(node: Any, output: int, gradient: Tensor) -> None:
        expected = node._input_metadata[output]
        if gradient.device != expected.device and gradient.ndim:
            raise RuntimeError(f'{node.name()} got a gradient on {gradient.device}, not on {expected.device}')
        gradient = gradient.sum_to_size(expected.shape).to(expected.device, expected.dtype)
        if node not in received:
            received[node] = [None] * len(node._input_metadata)
            age = 0 if hasattr(node, 'variable') else -node._sequence_nr()  # leaves come last
            heapq.heappush(queue, (age, next(counter), node))
        before = received[node][output]
        received[node][output] = gradient if before is None else before + gradient

    with torch.no_grad():
        receive(loss.grad_fn, loss.output_nr, torch.ones_like(loss) if gradient is None else gradient)
        while queue:
            *_, node = heapq.heappop(queue)
            returned = getattr(node, 'apply', node)(*received.pop(node))
            returned = returned if isinstance(returned, tuple) else (returned,)
            for (follower, output), gradient in zip(node.next_functions, returned, strict=False):
                if follower is not None and gradient is not None:
                    receive(follower, output, gradient)


def clear_caches() -> None:
    """Clear what functions of the project have cached by their arguments, of which one may be a device."""
    for module in list(sys.modules.values()):
        if path_in_project(getattr(module, '__file__', None) or ''):
            for function in vars(module).values():
                if hasattr(function, 'cache_clear') and inspect.signature(function).parameters:
                    function.cache_clear()


@contextlib.contextmanager
def emulated() -> Iterator[Gpu]:
    """Emulate two GPUs of compute capability 8.0. All that is patched is restored at the end."""
    gpu = Gpu()
    torch._C._ensureCUDADeviceGuardSet()
    run, to, engine = threading.Thread.run, torch.nn.Module.to, torch.autograd.backward
    swaps, lifts = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()

    def run_thread(thread: threading.Thread) -> None:
        with Watch(gpu):
            run(thread)

    def run_backward(tensors: Any, grad_tensors: Any = None, *args, **kwargs) -> None:
        if isinstance(tensors, DeviceTensor):
            assert not any(args) and not any(kwargs.values()), 'backward with options'
            backward(tensors, grad_tensors)
        else:
            engine(tensors, grad_tensors, *args, **kwargs)

    def move(module: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters keep their identity, as with CUDA
        try:
            return to(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)

    def reading(name: str) -> Callable[..., Any]:
        whole = getattr(Tensor, name)

        def read(tensor: Tensor, *args, **kwargs) -> Any:
            gpu.check_arrival(name, [tensor])
            return whole(tensor, *args, **kwargs)

        return read

    # In inference mode composite operations (`to`, `reshape`) come here whole; without gradients they do not.
    def enter(context: Any) -> None:
        context.instead = torch.set_grad_enabled(not context.mode and torch.is_grad_enabled())

    def leave(context: Any, *_) -> None:
        context.instead.__exit__(None, None, None)

    answers = {
        '_lazy_init': lambda: None,
        'is_available': lambda: True,
        'device_count': lambda: COUNT,
        'get_device_capability': lambda *_: (8, 0),
        'get_arch_list': lambda: ['sm_80'],
        'get_device_name': lambda *_: 'an emulated GPU',
        'is_bf16_supported': lambda *_, **__: True,
        'is_current_stream_capturing': lambda: False,
        'mem_get_info': lambda *_: (MEMORY, MEMORY),
        'manual_seed_all': lambda seed: None,
        'current_device': gpu.current_device,
        'set_device': gpu.set_device,
        'synchronize': gpu.synchronize,
        'Stream': partial(Stream, gpu),
        'Event': partial(Event, gpu),
        'current_stream': gpu.current_stream,
        'stream': gpu.streaming,
    }
    accelerator = {
        'is_available': lambda: True,
        'current_accelerator': lambda *_, **__: torch.device('cuda'),
        'current_device_index': gpu.current_device,
        'set_device_index': gpu.set_device,
        'current_stream': gpu.current_stream,
    }
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False):
        for module, functions in ((torch.cuda, answers), (torch.accelerator, accelerator)):
            for name, function in functions.items():
                patch.setattr(module, name, function)
        patch.setattr(threading.Thread, 'run', run_thread)
        patch.setattr(torch.nn.Module, 'to', move)
        patch.setattr(torch.autograd, 'backward', run_backward)
        for name in ('numpy', 'tolist'):  # of CPU tensors these are no operations
            patch.setattr(Tensor, name, reading(name))
        patch.setattr(torch.inference_mode, '__enter__', enter)
        patch.setattr(torch.inference_mode, '__exit__', leave)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device='cuda') copies, and that is seen
        try:
            with Watch(gpu):
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            clear_caches()
