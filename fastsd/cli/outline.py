"""Names as an outline: split at dots, with numbered siblings of the same structure folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fastsd.summary import TensorSummary

# Deeper than any model; what is left of a longer name is one part. Names come from files.
_DEPTH_MAX = 64
_SHOWN_RANGES_MAX = 4
_DIGITS_MAX = 18


@dataclass
class Node:
    """A part of names: with a ``tensor`` where a name ends, and ``children`` where one goes on."""

    label: str
    tensor: TensorSummary | None = None
    children: dict[str, Node] = field(default_factory=dict)
    count: int = 1  # how many equal siblings it stands for

    def measure(self) -> tuple[int, int]:
        """How many tensors, and their bytes, all equal siblings taken together."""
        sizes = [child.measure() for child in self.children.values()]
        if self.tensor is not None:
            sizes.append((1, 0 if self.tensor.is_tied else self.tensor.nbytes))
        tensors, nbytes = (sum(size[i] for size in sizes) for i in range(2))
        return self.count * tensors, self.count * nbytes


def build(tensors: list[TensorSummary], *, fold: bool) -> Node:
    """The outline of a file. ``fold``: put numbered siblings that are alike together."""
    root = Node("")
    for tensor in tensors:
        node = root
        for part in tensor.name.split(".", _DEPTH_MAX):
            node = node.children.setdefault(part, Node(part))
        node.tensor = tensor
    if fold:
        _fold(root, {})
    _join_chains(root)
    return root


def walk(node: Node, depth: int = 0) -> Iterator[tuple[int, Node]]:
    """The nodes below one, in order, with their depths."""
    for child in node.children.values():
        yield depth, child
        yield from walk(child, depth + 1)


def _fold(node: Node, known: dict[object, int]) -> int:
    """Folds what is below a node; returns a number that nodes of the same structure share."""
    groups: dict[object, list[Node]] = {}
    parts = []
    for label, child in node.children.items():
        shape = _fold(child, known)
        parts.append((label, shape))
        is_number = label.isascii() and label.isdigit() and len(label) <= _DIGITS_MAX
        groups.setdefault(shape if is_number else label, []).append(child)
    structure = (_describe(node.tensor), tuple(parts))
    node.children = {group[0].label: group[0] for group in groups.values()}
    for group in groups.values():
        group[0].count = len(group)
        group[0].label = _join([child.label for child in group])
    return known.setdefault(structure, len(known))


def _join_chains(node: Node) -> None:
    """Makes one line of a part that leads to one other alone: "q" and "weight" to "q.weight"."""
    for child in node.children.values():
        _join_chains(child)
        if child.tensor is None and len(child.children) == 1:
            (only,) = child.children.values()
            if only.count == 1:
                child.label = f"{child.label}.{only.label}"
                child.tensor, child.children = only.tensor, only.children


def _describe(tensor: TensorSummary | None) -> object:
    if tensor is None:
        return None
    own_stride = None if tensor.is_contiguous else tensor.stride
    extras = (own_stride, tensor.shares_with, tensor.device, tensor.requires_grad)
    return (tensor.dtype, tensor.shape, *extras)


def _join(labels: list[str]) -> str:
    """Numbers as ranges: "0..3, 7"."""
    if len(labels) == 1:
        return labels[0]
    ranges: list[tuple[int, int]] = []
    for number in sorted(int(label) for label in labels):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    texts = [f"{begin}..{end}" if end > begin else str(begin) for begin, end in ranges]
    if len(texts) > _SHOWN_RANGES_MAX:
        texts = [*texts[: _SHOWN_RANGES_MAX - 1], "...", texts[-1]]
    return ", ".join(texts)
