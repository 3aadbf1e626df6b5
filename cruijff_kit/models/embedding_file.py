"""Write the files of cruijff-kit embed: HDF5 or Parquet, by the file's suffix."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import atomic

if TYPE_CHECKING:
    from cruijff_kit.models.hidden_states import States

HDF5, PARQUET = (".h5", ".hdf5"), (".parquet",)


@dataclass
class EmbeddingTable:
    """Hidden states of texts, and their description."""

    states: "States"
    ids: list[int]
    """Number of each text."""
    texts: list[str] | None
    """None for sensitive data."""
    layers: list[int]
    """Numbers of the layers, in the order of the tensor."""
    pooling: str
    """One of POOLINGS, or NO_POOLING."""
    next_tokens: list[list[tuple[str, float]]] | None
    """The likeliest next tokens of each text, (token, probability)."""
    attributes: dict[str, Any]
    """Attributes of the file."""


def check_target(file: Path, force: bool) -> None:
    """Check that a file can be written.

    Raises:
        UserError: the file exists, its suffix is unknown, or a package is missing.
    """
    if file.suffix not in (*HDF5, *PARQUET):
        raise UserError(f"--to {file}: unknown format; write .h5, .hdf5 or .parquet")
    if file.is_dir():
        raise UserError(f"--to {file} is a folder; name a file in it")
    if file.exists() and not force:
        raise UserError(f"--to {file} exists already; choose another name, or add --force")
    if file.suffix in HDF5:
        try:
            import h5py  # noqa: F401
        except ImportError:
            raise UserError(f"{file.suffix} files need h5py; pip install 'cruijff_kit[hdf5]', or .parquet") from None


def write_table(table: EmbeddingTable, file: Path) -> None:
    """Write a table to a file that `check_target` accepts."""
    write_format: Callable[[EmbeddingTable, Path], None] = _write_hdf5 if file.suffix in HDF5 else _write_parquet
    with atomic(file.absolute()) as draft:
        write_format(table, draft)


def _write_hdf5(table: EmbeddingTable, file: Path) -> None:
    import h5py

    with h5py.File(file, "w") as out:
        out["tensor"] = table.states.tensor
        out["ids_dim0"] = table.ids
        out["attention_mask"] = table.states.attention_mask
        if table.states.logits is not None:
            out["logits"] = table.states.logits
        if table.next_tokens is not None:
            out["next_tokens"] = [[token for token, _ in row] for row in table.next_tokens]
            out["next_probabilities"] = [[probability for _, probability in row] for row in table.next_tokens]
        out.attrs["layers"] = table.layers
        for name, value in (table.attributes | {"pooling": table.pooling}).items():
            out.attrs[name] = "" if value is None else value


def _write_parquet(table: EmbeddingTable, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    states, columns = table.states, {"id": pa.array(table.ids, pa.int64())}
    if table.texts is not None:
        columns["text"] = pa.array(table.texts)
    for index, layer in enumerate(table.layers):
        columns[f"embedding_{layer}"] = _vector_column(states.tensor[:, index], states.attention_mask)
    if table.pooling == "none":
        columns["attention_mask"] = pa.array(list(states.attention_mask), pa.list_(pa.int8()))
    if states.logits is not None:
        columns["logits"] = _fixed_size_lists(states.logits)
    if table.next_tokens is not None:
        columns["next_tokens"] = pa.array([[token for token, _ in row] for row in table.next_tokens])
        columns["next_probabilities"] = pa.array([[probability for _, probability in row] for row in table.next_tokens])
    attributes = table.attributes | {"layers": table.layers, "pooling": table.pooling}
    arrow_table = pa.table(columns).replace_schema_metadata({"cruijff_kit": json.dumps(attributes)})
    pa.parquet.write_table(arrow_table, file)


def _vector_column(states: Any, mask: Any) -> Any:
    """Make a column of vectors.

    Args:
        states: [n, width], one vector per text; or [n, positions, width], a list of vectors per text.
        mask: [n, positions], 1 at tokens of a text; pads are left out of the lists.
    """
    import numpy as np
    import pyarrow as pa

    if states.ndim == 2:
        return _fixed_size_lists(states)
    vectors = states[mask.astype(bool)]  # [sum of the texts' lengths, width]
    offsets = np.concatenate([[0], mask.sum(1, dtype=np.int64).cumsum()])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _fixed_size_lists(vectors))


def _fixed_size_lists(matrix: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
