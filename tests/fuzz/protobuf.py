"""Changed ONNX models: fields of the messages, not only bytes."""

from __future__ import annotations

import random

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.fuzz.mutators import NUMBERS

TEXTS = (
    "",
    "x",
    "y",
    "a\0b",
    "../x",
    "/etc/passwd",
    "w",
    "Loop",
    "If",
    "猫",
    "x" * 3000,
    "ai.onnx",
)

MODELS = {
    "plain": """
        <ir_version: 8, opset_import: ["" : 17], metadata_props: ["a" : "b"]>
        g (float[batch, 4] x) => (float[batch, 3] y)
        <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] b = {1, 2, 3}>
        { h = MatMul (x, w) i = Add (h, b) y = Relu (i) }""",
    "control": """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y)
        {
            n = Constant <value_int: int = 3> ()
            c = Constant <value = bool {1}> ()
            z = Loop (n, c, x) <body = b (int64 i, bool go, float[2] a) => (bool on, float[2] o)
                { on = Identity (go) o = Add (a, a) }>
            s = ReduceSum <keepdims = 0> (z)
            k = Cast <to = 9> (s)
            y = If (k) <then_branch = t () => (float[2] u) { u = Relu (z) },
                        else_branch = e () => (float[2] v) { v = Neg (z) }>
        }""",
    "function": """
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N, 2] x) => (float[N, 2] y) { y = own.f (x) }
        <domain: "own", opset_import: ["" : 17]>
        f (a) => (b) { c = Neg (a) b = Relu (c) }""",
    "conv": """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 2, 2, 2] y)
        <float[2, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}>
        { y = Conv <kernel_shape = [3, 3]> (x, w) }""",
}


def model(name: str) -> onnx.ModelProto:
    """A small model; ``external`` has its weights in a file that does not exist."""
    built = onnx.parser.parse_model(MODELS["plain" if name == "external" else name])
    if name == "external":
        weight = built.graph.initializer[0]
        weight.ClearField("float_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "48")):
            weight.external_data.add(key=key, value=value)
    return built


def _messages(message: Message) -> list[Message]:
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                found += _messages(inner)
    return found


def _value(field: FieldDescriptor, random_: random.Random) -> object:
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        text = random_.choice(TEXTS)
        return text if field.type == FieldDescriptor.TYPE_STRING else text.encode() + b"\xff"
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return random_.choice((0.0, -1.0, float("nan"), float("inf")))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return random_.choice([value.number for value in field.enum_type.values])
    number = random_.choice((*NUMBERS, -1, -(2**31), 3, 7, 11, 17, 23))
    if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32):
        return (number + 2**31) % 2**32 - 2**31
    if field.type == FieldDescriptor.TYPE_UINT64:
        return number % 2**64
    return (number + 2**63) % 2**64 - 2**63


def changed_model(built: onnx.ModelProto, random_: random.Random) -> None:
    """Set, clear, repeat or remove fields, once to three times."""
    for _ in range(random_.choice((1, 1, 2, 3))):
        message = random_.choice(_messages(built))
        present = [field for field, _ in message.ListFields()]
        field = random_.choice(present or list(message.DESCRIPTOR.fields))
        if random_.random() < 0.2:
            field = random_.choice(message.DESCRIPTOR.fields)
        if random_.random() < 0.15:
            message.ClearField(field.name)
        elif hasattr(values := getattr(message, field.name), "append"):
            if len(values) and random_.random() < 0.5:
                del values[random_.randrange(len(values))]
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                new = values.add()
                if len(values) > 1:
                    new.CopyFrom(values[0])
            else:
                values.append(_value(field, random_))
        elif field.type != FieldDescriptor.TYPE_MESSAGE:
            setattr(message, field.name, _value(field, random_))
        else:
            getattr(message, field.name).SetInParent()
