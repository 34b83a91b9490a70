"""Names and types of the columns of scores, and how stored ones are brought to them.

Files may come from elsewhere than fastfi: Ray writes a column without values as Arrow's null type,
pandas makes integers with gaps float64 with NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

from fastfi._extras import require
from fastfi.errors import DataError

__all__ = [
    "Columns",
    "block_names",
    "conform",
    "excerpt",
    "is_fi",
    "is_number",
    "planned_columns",
    "unify",
]

_FI = re.compile(r"fi([:@].*)?", re.DOTALL)
_SECOND = "predicted_"  # before the names of the predicted class's columns
_WHOLE = re.compile(r"label|predicted|(predicted_)?rank(:.*)?", re.DOTALL)
_REAL = re.compile(r"(predicted_)?(log_prob|fi([:@].*)?)", re.DOTALL)


def excerpt(text: object, most: int = 200) -> str:
    """The beginning of a text from a file, for a message: what cannot be printed becomes "?"."""
    whole = "".join(c if c.isprintable() else "?" for c in str(text))
    return whole if len(whole) <= most else whole[:most] + "..."


def is_number(name: str) -> bool:
    """Whether a column of this name holds numbers, by its name alone."""
    return any(of.fullmatch(name) for of in (_WHOLE, _REAL))


def is_fi(name: str) -> bool:
    """Whether a column holds FI of the class that was asked for: "fi", "fi:conv1", "fi@margin"."""
    return _FI.fullmatch(name) is not None


def block_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the blocks that have columns of their own; () where FI is of one block.

    Columns of ranks tell them, since an "@" in "fi:a@b" may belong to the block's name.
    """
    ranks = [name.removeprefix("rank:") for name in names if name.startswith("rank:")]
    if ranks:
        return tuple(ranks)
    blocks = [name.removeprefix("fi:").rpartition("@") for name in names if name.startswith("fi:")]
    return tuple(dict.fromkeys(head or tail for head, _, tail in blocks))


class Columns(NamedTuple):
    """The columns of a set of scores, over all of its files.

    Attributes:
        types: of each column, pyarrow.DataType, in the order of the first file.
        id_type: "int" or "str".
    """

    types: dict[str, Any]
    id_type: Literal["int", "str"]


def _id_type(kind: Any, where: str) -> Literal["int", "str"]:
    t = require("pyarrow.types", "reading scores", "score")
    if t.is_dictionary(kind):
        kind = kind.value_type
    if t.is_string(kind) or t.is_large_string(kind):
        return "str"
    if t.is_integer(kind):
        return "int"
    raise DataError(f"{where}: column id: expected integers or strings, got {kind}")


def _check(names: Sequence[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: holds a column {excerpt(twice)!r} more than once")
    if "id" not in names or not any(map(is_fi, names)):
        raise DataError(
            f"{where}: expected scores, with a column id and a column fi, fi:NAME or "
            f"fi@OBJECTIVE; the columns are {excerpt(', '.join(names)) or 'none'}"
        )


def unify(schemas: Sequence[tuple[str, Any]]) -> Columns:
    """The columns that all files together have.

    Args:
        schemas: one (name of the file, pyarrow.Schema) for each, at least one.

    Raises:
        DataError: a file holds no scores, not the same columns of FI as the first, or ids of
            another type.
    """
    pa = require("pyarrow", "reading scores", "score")
    types: dict[str, Any] = {}
    first, ids = schemas[0], ""
    fi = [name for name in first[1].names if is_fi(name.removeprefix(_SECOND))]
    seen = None
    for where, schema in schemas:
        if seen is not None and schema.equals(seen):
            continue
        seen = schema
        _check(schema.names, where)
        differ = {n for n in schema.names if is_fi(n.removeprefix(_SECOND))}.symmetric_difference(
            fi
        )
        if differ:
            raise DataError(
                f"{where}: expected the columns of {first[0]}, but "
                f"{', '.join(sorted(differ))} is in one of them only"
            )
        for field in schema:
            known = types.get(field.name)
            if known is None or pa.types.is_null(known):
                types[field.name] = field.type
        kind = schema.field("id").type
        if pa.types.is_null(kind):
            continue  # without rows, or without ids
        here = _id_type(kind, where)
        if ids and here != ids:
            raise DataError(
                f"{where}: its ids are {'strings' if here == 'str' else 'integers'}, those of "
                f"{first[0]} are not"
            )
        ids = here
    id_type: Literal["int", "str"] = "str" if ids == "str" else "int"
    for name in types:
        if name == "id":
            types[name] = pa.string() if id_type == "str" else pa.int64()
        elif _WHOLE.fullmatch(name):
            types[name] = pa.int64()
        elif _REAL.fullmatch(name):
            types[name] = pa.float64()
        elif name == "error":
            types[name] = pa.string()
    return Columns(types, id_type)


def planned_columns(manifest: Mapping[str, Any]) -> Columns:
    """The columns that the run of a manifest writes; none where the manifest does not tell them.

    They are those of :func:`fastfi.scoring.measure.value_columns` between the ones of any run.
    """
    config, blocks = manifest.get("config"), manifest.get("blocks")
    id_type: Literal["int", "str"] = "str" if manifest.get("id_type") == "str" else "int"
    if not isinstance(config, dict):
        return Columns({}, id_type)
    wrt, objectives = config.get("wrt"), config.get("objective")
    single = isinstance(wrt, str) and wrt != "layers"
    if not _texts(objectives) or not (single or _texts(blocks)):
        return Columns({}, id_type)
    pa = require("pyarrow", "reading scores", "score")
    ends = [""] if single else [f":{name}" for name in blocks or ()]
    suffixes = [f"@{name}" for name in objectives] if len(objectives) > 1 else [""]
    types = {"id": pa.string() if id_type == "str" else pa.int64()}
    types |= dict.fromkeys(("label", "predicted"), pa.int64())
    for kind in ("", _SECOND) if config.get("y") == "both" else ("",):
        types[f"{kind}log_prob"] = pa.float64()
        types |= {f"{kind}fi{end}{at}": pa.float64() for at in suffixes for end in ends}
        types |= {f"{kind}rank{end}": pa.int64() for end in ends}
    types["error"] = pa.string()
    return Columns(types, id_type)


def _texts(value: Any) -> TypeGuard[list[str]]:
    """Whether a value from a file is a list of texts, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def conform(table: Any, names: Sequence[str], columns: Columns, where: str) -> Any:
    """A pyarrow.Table with the columns ``names`` in the set's types; nulls for those it lacks.

    Raises:
        DataError: values that the type cannot hold.
    """
    pa = require("pyarrow", "reading scores", "score")
    have = set(table.column_names)
    arrays = []
    for name in names:
        kind = columns.types[name]
        if name not in have:
            arrays.append(pa.chunked_array([pa.nulls(len(table), kind)], kind))
            continue
        try:
            column = _as(table.column(name), kind)
            arrays.append(_without_empty(column) if name == "error" else column)
        except pa.ArrowException as error:
            given = table.column(name).type
            raise DataError(
                f"{where}: column {name}: expected {kind}, got {given} that does not fit: "
                f"{excerpt(error)}"
            ) from error
    schema = pa.schema([pa.field(name, columns.types[name]) for name in names])
    if not names:
        return table.select([])
    return pa.Table.from_arrays(arrays, schema=schema)


def _without_empty(column: Any) -> Any:
    """Texts, with nulls for empty ones: CSV does not tell them apart."""
    pa = require("pyarrow", "reading scores", "score")
    compute = require("pyarrow.compute", "reading scores", "score")
    return compute.if_else(compute.equal(column, ""), pa.scalar(None, column.type), column)


def _as(column: Any, kind: Any) -> Any:
    if column.type == kind:
        return column
    pa = require("pyarrow", "reading scores", "score")
    compute = require("pyarrow.compute", "reading scores", "score")
    if pa.types.is_integer(kind) and pa.types.is_floating(column.type):
        # pandas' way of writing integers with gaps
        column = compute.if_else(compute.is_nan(column), pa.scalar(None, column.type), column)
    return column.cast(kind)
