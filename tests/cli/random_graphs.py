"""Small valid ONNX graphs of many kinds, drawn at random."""

from __future__ import annotations

from random import Random

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

FLOATS = (*[T.FLOAT] * 8, T.FLOAT16, T.DOUBLE)
OTHERS = (T.INT64, T.INT32, T.BOOL, T.UINT8, T.INT8, T.STRING, T.BFLOAT16, T.UINT64)
SIZES = (0, 1, 1, 2, 3, 4, 8)


class Drawn:
    """A graph under construction: ``values`` are the tensors so far, (name, type, shape)."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.opset = random.randint(7, 24)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[tuple[str, int, tuple[int, ...]]] = []
        self.values: list[tuple[str, int, tuple[int, ...]]] = []
        self.functions: list[onnx.FunctionProto] = []
        self.batch = random.choice((None, 1, 2, 4))
        """The first size of every input; None: whatever comes."""
        self._count = 0

    def name(self, kind: str = "v") -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        if rank is None:
            rank = self.random.choice((0, 1, 2, 2, 3, 4, 4, 5) if self.batch is None else
                                      (1, 2, 2, 3, 4, 4))  # fmt: skip
        if self.batch is not None and rank:
            return (self.batch, *self.sizes(rank - 1))
        return self.sizes(rank)

    def sizes(self, rank: int) -> tuple[int, ...]:
        return tuple(self.random.choice(SIZES[1:] if self.random.random() < 0.95 else SIZES)
                     for _ in range(rank))  # fmt: skip

    def array(self, kind: int, shape: tuple[int, ...]) -> np.ndarray:
        seeded = np.random.default_rng(self.random.randint(0, 2**31))
        if kind == T.STRING:
            return np.array([f"w{i}" for i in range(int(np.prod(shape)))], object).reshape(shape)
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if kind in (*FLOATS, T.BFLOAT16):
            scale = self.random.choice((1, 1, 1, 1e-6, 1e4, 0))
            return np.asarray(seeded.standard_normal(shape) * scale).astype(dtype)
        return np.asarray(seeded.integers(0, 3, shape)).astype(dtype)

    def weight(self, kind: int, shape: tuple[int, ...], array: np.ndarray | None = None) -> str:
        name = self.name("w")
        values = self.array(kind, shape) if array is None else array
        if kind == T.STRING:
            flat = [str(v).encode() for v in values.ravel()]
            tensor = helper.make_tensor(name, kind, shape, flat)
        elif kind == T.BFLOAT16:
            tensor = numpy_helper.from_array(values, name)
        else:
            tensor = numpy_helper.from_array(np.asarray(values), name)
        if self.random.random() < 0.1:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.weights.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        return self.weight(T.INT64, (len(values),), np.array(values, np.int64))

    def pick(self, kinds=None, rank=None, least=0) -> tuple[str, int, tuple[int, ...]]:
        fits = [
            v for v in self.values
            if (kinds is None or v[1] in kinds)
            and (rank is None or len(v[2]) == rank)
            and len(v[2]) >= least
        ]  # fmt: skip
        if fits and self.random.random() < 0.9:
            return self.random.choice(fits[-6:])
        kind = self.random.choice(kinds or FLOATS)
        shape = self.shape(rank if rank is not None else max(least, self.random.randint(0, 4)))
        return self.input(kind, shape)

    def input(self, kind: int, shape: tuple[int, ...]) -> tuple[str, int, tuple[int, ...]]:
        # One number for all samples cannot come from a file of samples.
        constant = 0.3 if self.batch is None else 1 if not shape else 0.05
        if self.random.random() < constant:
            value = (self.weight(kind, shape), kind, shape)
        else:
            value = (self.name("in"), kind, shape)
            self.inputs.append(value)
        self.values.append(value)
        return value

    def add(self, op: str, inputs: list[str], kind: int, shape: tuple[int, ...], **attributes):
        out = self.name()
        name = self.name("node")
        name = self.random.choice(("", name, name, name)) if self.random.random() < 0.9 else "same"
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op, inputs, [out], name, domain=domain, **attributes))
        self.values.append((out, kind, shape))
        return out


def _unary(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    op = g.random.choice(("Relu", "Sigmoid", "Tanh", "Exp", "Neg", "Abs", "Sqrt", "Identity",
                          "Log", "Softplus", "Erf", "LeakyRelu", "Elu", "Floor"))  # fmt: skip
    if op == "Erf" and g.opset < 9:
        op = "Tanh"
    g.add(op, [name], kind, shape)


def _binary(g: Drawn) -> None:
    name, kind, shape = g.pick((*FLOATS, T.INT64, T.INT32))
    op = g.random.choice(("Add", "Mul", "Sub", "Div", "Max", "Pow"))
    if op in ("Max", "Pow") and (kind not in (T.FLOAT, T.DOUBLE) or g.opset < 8):
        op = "Add"
    other = g.random.choice(("same", "weight", "scalar"))
    if other == "same":
        second = name
    else:
        size = shape[-1:] if other == "weight" else ()
        second = g.weight(kind, size, np.ones(size) .astype(helper.tensor_dtype_to_np_dtype(kind))
                          if op == "Div" else None)  # fmt: skip
    if op == "Div" and kind in (T.INT64, T.INT32) and second == name:
        op = "Mul"
    inputs = [name, second] if g.random.random() < 0.8 else [second, name]
    if op == "Div" and kind in (T.INT64, T.INT32):
        inputs = [name, second]
    g.add(op, inputs, kind, shape)


def _conv(g: Drawn) -> None:
    rank = g.random.choice((3, 4, 4, 4, 5))
    name, kind, shape = g.pick(FLOATS, rank=rank)
    if 0 in shape:
        return
    groups = shape[1] if g.random.random() < 0.2 else 1
    out = groups * g.random.choice((1, 2, 4))
    if g.random.random() < 0.2:
        w = g.weight(kind, (shape[1], out // groups, *[1] * (rank - 2)))
        g.add("ConvTranspose", [name, w], kind, (shape[0], out, *shape[2:]), group=groups)
        return
    w = g.weight(kind, (out, shape[1] // groups, *[3] * (rank - 2)))
    inputs = [name, w, g.weight(kind, (out,))] if g.random.random() < 0.6 else [name, w]
    pads = [1] * (2 * (rank - 2))
    made = g.add("Conv", inputs, kind, (shape[0], out, *shape[2:]), group=groups, pads=pads)
    if g.random.random() < 0.4:
        parts = [g.weight(kind, (out,)) for _ in range(3)]
        var = g.weight(kind, (out,), np.abs(g.array(kind, (out,))) + np.ones(out).astype(
            helper.tensor_dtype_to_np_dtype(kind)))  # fmt: skip
        g.add("BatchNormalization", [made, *parts, var], kind, (shape[0], out, *shape[2:]))


def _product(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS, least=1)
    columns = g.random.choice((1, 2, 8, 16))
    if len(shape) == 2 and g.random.random() < 0.6:
        transposed = g.random.random() < 0.5
        w = g.weight(kind, (columns, shape[1]) if transposed else (shape[1], columns))
        more = g.random.choice(((), ((columns,),), ((1, columns),), ((),), ((shape[0], columns),)))
        if not more and g.opset < 11:
            more = ((columns,),)
        g.add("Gemm", [name, w, *(g.weight(kind, m) for m in more)], kind, (shape[0], columns),
              transB=int(transposed), alpha=g.random.choice((1.0, 0.5)))  # fmt: skip
        return
    batch = shape[:-2] if g.random.random() < 0.2 else ()
    w = g.weight(kind, (*batch, shape[-1], columns))
    g.add("MatMul", [name, w], kind, (*shape[:-1], columns))


def _transpose(g: Drawn) -> None:
    name, kind, shape = g.pick(least=1)
    order = list(range(len(shape)))
    g.random.shuffle(order)
    g.add("Transpose", [name], kind, tuple(shape[i] for i in order), perm=order)


def _reshape(g: Drawn) -> None:
    name, kind, shape = g.pick()
    if 0 in shape:
        return
    size = int(np.prod(shape))
    g.add("Reshape", [name, g.ints(-1)], kind, (size,))


def _flatten(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS, least=1)
    g.add("Flatten", [name], kind, (shape[0], int(np.prod(shape[1:]))))


def _reduce(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS, least=1)
    if 0 in shape:
        return
    op = g.random.choice(("ReduceMean", "ReduceSum", "ReduceMax"))
    g.add(op, [name], kind, (1,) * len(shape))


def _softmax(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS, least=1)
    g.add("Softmax", [name], kind, shape, axis=len(shape) - 1)


def _pool(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS, rank=4)
    op = g.random.choice(("GlobalAveragePool", "MaxPool", "AveragePool", "GlobalMaxPool"))
    if 0 in shape:
        return
    if op.startswith("Global"):
        g.add(op, [name], kind, (*shape[:2], 1, 1))
    else:
        g.add(op, [name], kind, shape, kernel_shape=[3, 3], pads=[1] * 4)


def _concat(g: Drawn) -> None:
    name, kind, shape = g.pick(least=1)
    others = [v[0] for v in g.values if v[1:] == (kind, shape)] + [g.weight(kind, shape)]
    second = g.random.choice(others)
    g.add("Concat", [name, second], kind, (shape[0] * 2, *shape[1:]), axis=0)


def _cast(g: Drawn) -> None:
    name, _, shape = g.pick((*FLOATS, T.INT64, T.INT32, T.BOOL, T.UINT8))
    to = g.random.choice((*FLOATS, T.INT64, T.INT32, T.BOOL))
    g.add("Cast", [name], to, shape, to=to)


def _shape_of(g: Drawn) -> None:
    name, _, shape = g.pick()
    g.add("Shape", [name], T.INT64, (len(shape),))


def _gather(g: Drawn) -> None:
    kind = g.random.choice(FLOATS)
    table = g.weight(kind, (5, g.random.choice((3, 16, 32))))
    index, _, shape = g.pick((T.INT64, T.INT32))
    g.add("Gather", [table, index], kind, (*shape, 3))


def _compare(g: Drawn) -> None:
    name, kind, shape = g.pick((T.FLOAT, T.DOUBLE) if g.opset < 11 else (*FLOATS, T.INT64))
    if g.opset < 9:
        return
    g.add(g.random.choice(("Less", "Greater")), [name, g.weight(kind, ())], T.BOOL, shape)


def _arg_max(g: Drawn) -> None:
    name, _, shape = g.pick(FLOATS, least=1)
    if 0 not in shape:
        g.add("ArgMax", [name], T.INT64, (1, *shape[1:]), axis=0)


def _recurrent(g: Drawn) -> None:
    name, kind, shape = g.pick((T.FLOAT,), rank=3)
    if 0 in shape:
        return
    op, gates = g.random.choice((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    w, r = (g.weight(kind, (1, gates * 4, n)) for n in (shape[2], 4))
    g.add(op, [name, w, r], kind, (shape[0], 1, shape[1], 4), hidden_size=4)


def _normalize(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS, least=1)
    if g.opset < 17:
        return
    g.add("LayerNormalization", [name, g.weight(kind, shape[-1:])], kind, shape, axis=-1)


def _if(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    condition = g.pick((T.BOOL,), rank=0)[0]
    branches = []
    for op in ("Relu", "Neg"):
        out = g.name("inner")
        info = helper.make_tensor_value_info(out, kind, [None] * len(shape))
        inner = [helper.make_node(op, [name], [out])]
        weights = []
        if len(shape) == 2 and op == "Relu":
            weights = [numpy_helper.from_array(g.array(kind, (shape[1], shape[1])), out + "w")]
            inner = [helper.make_node("MatMul", [name, out + "w"], [out])]
        branches.append(helper.make_graph(inner, out, [], [info], weights))
    g.add("If", [condition], kind, shape, then_branch=branches[0], else_branch=branches[1])


def _loop(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    trips = g.pick((T.INT64,), rank=0)[0] if g.random.random() < 0.5 else g.weight(
        T.INT64, (), np.array(3))  # fmt: skip
    ids = [g.name("inner") for _ in range(5)]
    body = helper.make_graph(
        [
            helper.make_node("Tanh", [ids[2]], [ids[3]]),
            helper.make_node("Identity", [ids[1]], [ids[4]]),
        ],
        g.name("body"),
        [
            helper.make_tensor_value_info(ids[0], T.INT64, []),
            helper.make_tensor_value_info(ids[1], T.BOOL, []),
            helper.make_tensor_value_info(ids[2], kind, [None] * len(shape)),
        ],
        [
            helper.make_tensor_value_info(ids[4], T.BOOL, []),
            helper.make_tensor_value_info(ids[3], kind, [None] * len(shape)),
        ],
    )
    g.add("Loop", [trips, "", name], kind, shape, body=body)


def _sequence(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    if g.opset < 11:
        return
    made = g.name("seq")
    g.nodes.append(helper.make_node("SequenceConstruct", [name, name], [made]))
    index = g.weight(T.INT64, (), np.array(1))
    g.add("SequenceAt", [made, index], kind, shape)


def _strings(g: Drawn) -> None:
    name, kind, shape = g.pick((T.STRING,))
    if g.opset >= 13:
        g.add("Identity", [name], kind, shape)


def _function(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    if g.opset < 15:
        return
    called = g.name("Fn")
    body = [helper.make_node("Relu", ["a"], ["h"]), helper.make_node("Add", ["h", "a"], ["b"])]
    opsets = [helper.make_opsetid("", g.opset)]
    g.functions.append(helper.make_function("local", called, ["a"], ["b"], body, opsets))
    g.add(called, [name], kind, shape, domain="local")


def _quantized(g: Drawn) -> None:
    name, kind, shape = g.pick((T.FLOAT,))
    if g.opset < 13 or g.random.random() < 0.7:
        return
    scale = g.weight(T.FLOAT, (), np.array(0.1, np.float32))
    zero = g.weight(T.UINT8, (), np.array(3, np.uint8))
    stored = g.add("QuantizeLinear", [name, scale, zero], T.UINT8, shape)
    g.add("DequantizeLinear", [stored, scale, zero], kind, shape)


def _expand(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    if g.opset >= 8:
        g.add("Expand", [name, g.ints(2, *shape)], kind, (2, *shape))


def _where(g: Drawn) -> None:
    name, kind, shape = g.pick(FLOATS)
    if g.opset >= 9:
        g.add("Where", [g.pick((T.BOOL,), rank=0)[0], name, g.weight(kind, ())], kind, shape)


def _top_k(g: Drawn) -> None:
    name, kind, shape = g.pick((T.FLOAT,), least=1)
    if g.opset < 10 or shape[-1] < 1:
        return
    out = [g.name(), g.name()]
    g.nodes.append(helper.make_node("TopK", [name, g.ints(1)], out))
    g.values += [(out[0], kind, (*shape[:-1], 1)), (out[1], T.INT64, (*shape[:-1], 1))]


OPERATIONS = (
    *(
        _conv,
        _conv,
        _product,
        _product,
        _product,
        _unary,
        _binary,
        _conv,
        _product,
        _transpose,
        _reshape,
        _flatten,
        _reduce,
    ),
    *(_softmax, _pool, _concat, _cast, _shape_of, _gather, _compare, _arg_max, _recurrent),
    *(_normalize, _if, _loop, _sequence, _strings, _function, _quantized, _expand, _where, _top_k),
)


def random_graph(random: Random) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model that ONNX's checker takes, and four samples of its inputs, (4, …) or so."""
    while True:
        drawn = Drawn(random)
        for _ in range(random.choice((0, 1, 2, 2, 3))):
            kind = random.choice(FLOATS + FLOATS + OTHERS)
            drawn.input(kind, drawn.shape())
        if random.random() < 0.6:
            random.choice((_conv, _product))(drawn)
        for _ in range(random.choice((0, 1, 2, 3, 4, 6, 9))):
            random.choice(OPERATIONS)(drawn)
        model = _model(drawn)
        if model is not None:
            return model, _samples(drawn, model)


def _model(drawn: Drawn) -> onnx.ModelProto | None:
    random = drawn.random
    if not drawn.values:
        return None
    count = random.choice((1, 1, 1, 2, 3))
    named = random.random() < 0.5
    last = drawn.values[-3:] if random.random() < 0.7 else drawn.values
    chosen = list(dict.fromkeys(random.choice(last) for _ in range(count)))
    if random.random() < 0.03:
        chosen.append(chosen[0])

    def declared(name: str, kind: int, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        dims = [f"{name}d{i}" if i and random.random() < 0.2 else d for i, d in enumerate(shape)]
        if dims and named:
            dims[0] = "batch"
        return helper.make_tensor_value_info(name, kind, dims)

    inputs = [declared(*value) for value in drawn.inputs]
    made = {value.name: value for value in inputs}
    outputs = []
    for name, kind, shape in chosen:
        if name in made:
            outputs.append(made[name])
        elif random.random() < 0.2:
            outputs.append(helper.make_tensor_value_info(name, kind, None))
        else:
            outputs.append(helper.make_tensor_value_info(name, kind, [None] * len(shape)))
    old = random.random() < 0.1
    if old:
        inputs += [
            helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in drawn.weights
        ]
    graph = helper.make_graph(drawn.nodes, "g", inputs, outputs, drawn.weights)
    opsets = [helper.make_opsetid("", drawn.opset)]
    if drawn.functions:
        opsets.append(helper.make_opsetid("local", 1))
    ir = 3 if old and not drawn.functions else random.choice((8, 9, 10))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=drawn.functions)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    return model


def _samples(drawn: Drawn, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    batched = any(value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input
                  if value.type.tensor_type.shape.dim)  # fmt: skip
    found = {}
    for name, kind, shape in drawn.inputs:
        if kind == T.BFLOAT16:
            kind = T.FLOAT
        rows = 4 if batched or drawn.batch else 4 * max(shape[0], 1) if shape else 4
        array = drawn.array(kind, (rows, *shape[1:]))
        found[name] = array.astype(str) if kind == T.STRING else array
    return found
