"""Pure: which block holds the KV of which prefix: a tree whose edges are the tokens of full blocks.

A lookup compares tokens along the whole way from the root, so it can never give the KV of other tokens,
whatever hashes do. The chain hash of a node only names it to others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.kv.block_hash import ROOT_HASH, extend_hash
from tandem.ids import BlockHash, BlockId


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A full block in the cache; `tokens` are its own, `chain_hash` covers the prefix up to its end."""

    block: BlockId
    tokens: tuple[int, ...]
    chain_hash: BlockHash
    parent: "PrefixNode | None"
    children: "dict[tuple[int, ...], PrefixNode]" = field(default_factory=dict)


class PrefixTree:
    """Full blocks by prefix. Knows nothing of references; the pool decides what stays."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._roots: dict[tuple[int, ...], PrefixNode] = {}
        self._nodes: dict[BlockId, PrefixNode] = {}

    def __contains__(self, block: BlockId) -> bool:
        return block in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes, in no particular order."""
        return iter(self._nodes.values())

    def walk(self, token_ids: Sequence[int], max_blocks: int) -> list[BlockId]:
        """Blocks of the longest cached prefix of `token_ids`, at most `max_blocks` of them."""
        found: list[BlockId] = []
        level = self._roots
        for index in range(max_blocks):
            node = level.get(self._tokens_of(token_ids, index))
            if node is None:
                break
            found.append(node.block)
            level = node.children
        return found

    def insert(self, token_ids: Sequence[int], blocks: Sequence[BlockId]) -> list[PrefixNode]:
        """Adds the full blocks of `token_ids`; returns the nodes that are new.

        Where the prefix is cached in another block already, that block stays and ours is not added.
        """
        added: list[PrefixNode] = []
        parent: PrefixNode | None = None
        level = self._roots
        for index in range(min(len(blocks), len(token_ids) // self._block_size)):
            tokens = self._tokens_of(token_ids, index)
            node = level.get(tokens)
            if node is None:
                if blocks[index] in self._nodes:
                    break
                parent_hash = parent.chain_hash if parent is not None else ROOT_HASH
                node = PrefixNode(blocks[index], tokens, extend_hash(parent_hash, tokens), parent)
                level[tokens] = node
                self._nodes[node.block] = node
                added.append(node)
            parent, level = node, node.children
        return added

    def remove(self, block: BlockId) -> list[PrefixNode]:
        """Removes a block and all that extend its prefix, since no lookup could reach them; returns them."""
        top = self._nodes[block]
        siblings = top.parent.children if top.parent is not None else self._roots
        del siblings[top.tokens]
        removed: list[PrefixNode] = []
        pending = [top]
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            del self._nodes[node.block]
            removed.append(node)
        return removed

    def _tokens_of(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self._block_size : (index + 1) * self._block_size])
