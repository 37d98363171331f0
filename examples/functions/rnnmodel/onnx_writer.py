"""The few ONNX messages a small network needs, as protobuf bytes.

ONNX is a protobuf schema (onnx.proto, IR version 8 here). Writing its wire
format takes less than the `onnx` package would bring: each message below is
named after the schema's and returns its serialised bytes.
"""

FLOAT, INT64 = 1, 7
_ATTRIBUTE_INT = 2
_IR_VERSION = 8

_NUMPY_TYPES = {"float32": FLOAT, "int64": INT64}


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int(field, value):
    return _varint(field << 3) + _varint(value)


def _bytes(field, value):
    if isinstance(value, str):
        value = value.encode()
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def tensor(name, array):
    """TensorProto of a float32 or int64 numpy array."""
    dims = b"".join(_int(1, dim) for dim in array.shape)
    kind = _NUMPY_TYPES[array.dtype.name]
    return dims + _int(2, kind) + _bytes(8, name) + _bytes(9, array.tobytes())


def value_info(name, kind, shape):
    """ValueInfoProto: a named tensor of the graph's interface."""
    dims = b"".join(_bytes(1, _int(1, dim)) for dim in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _int(1, kind) + _bytes(2, dims)))


def node(operator, inputs, outputs, **attributes):
    """NodeProto with integer attributes; an input "" is one left out."""
    return (
        b"".join(_bytes(1, name) for name in inputs)
        + b"".join(_bytes(2, name) for name in outputs)
        + _bytes(4, operator)
        + b"".join(
            _bytes(5, _bytes(1, name) + _int(3, value) + _int(20, _ATTRIBUTE_INT))
            for name, value in attributes.items()
        )
    )


def model(name, nodes, initializers, inputs, outputs, opset=17):
    """ModelProto of one graph."""
    graph = (
        b"".join(_bytes(1, item) for item in nodes)
        + _bytes(2, name)
        + b"".join(_bytes(5, item) for item in initializers)
        + b"".join(_bytes(11, item) for item in inputs)
        + b"".join(_bytes(12, item) for item in outputs)
    )
    return _int(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _int(2, opset))
