"""Damage done to a file on purpose: to its JSON, where it has some, or to its bytes."""

import json
import random

_VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, "", "a", "\x00"]
_VALUES += [
    "../x",
    "/etc/passwd",
    "manifest.json",
    "\ud800",
    "F32",
    "I64",
    "int8",
    "rows",
    "BF16",
    "F64",
    [],
    {},
    [0],
    [[]],
    {"": {}},
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four mutations."""
    for _ in range(chance.randint(1, 4)):
        data = _in_json(data, chance) if chance.random() < 0.6 else _in_bytes(data, chance)
    return data


def _in_json(data: bytes, chance: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _in_bytes(data, chance)
    places = list(_places(value))
    if not places:
        return json.dumps(chance.choice(_VALUES)).encode()
    holder, key = chance.choice(places)
    action = chance.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[key] = chance.choice(_VALUES)
    elif action == 2 and type(holder[key]) is int:
        holder[key] += chance.choice([-1, 1, -64, 64, holder[key], -2 * holder[key]])
    elif action == 3:
        other, another = chance.choice(places)
        try:
            holder[key], other[another] = other[another], holder[key]
            json.dumps(value)
        except (ValueError, RecursionError):  # one holds the other
            return data
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[f"{key}{chance.randrange(9)}"] = holder[key]
    return json.dumps(value).encode()


def _places(value: object):
    """(list or dict, key) of everything inside `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _in_bytes(data: bytes, chance: random.Random) -> bytes:
    content = bytearray(data)
    start = chance.randint(0, len(content))
    length = min(chance.choice([1, 1, 1, 2, 4, 8, 64]), len(content) - start)
    action = chance.randrange(5)
    if action == 0:
        del content[start:]
    elif action == 1:
        del content[start : start + length]
    elif action == 2:
        random_bytes = bytes(chance.randrange(256) for _ in range(length))
        content[start:start] = chance.choice([random_bytes, random_bytes, b"[" * 20_000, b"7" * 5000])
    elif action == 3:
        content[start : start + length] = bytes(length) if chance.random() < 0.5 else b"\xff" * length
    elif content:
        content[min(start, len(content) - 1)] ^= 1 << chance.randrange(8)
    return bytes(content)
