"""Branches: which pieces of a block are its sites, of what kind, and what runs only for one of them."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dicache.anatomy.overrides import TURN
from dicache.anatomy.parts import AnatomyError, Site
from dicache.anatomy.probing import Probe, carries, depending, feeding_only, nan_like, same
from dicache.anatomy.recognising import count_matrices, is_attention, is_branch, is_called_attention, is_matrix
from dicache.anatomy.watching import BlockCall, PieceCall, Returns

KIND_WORDS = re.compile(r"self_?attn|cross_?attn|attention|attn|feed_?forward|ffn|mlp|ff|\d+$", re.IGNORECASE)


def sites_of(call: BlockCall, returns: Returns) -> tuple[Site, ...]:
    """Return the sites of a block in the order in which they begin.

    Attentions and feed-forwards are sites by themselves. A matrix that the block applies itself, and that makes
    tokens of a stream's width from what other pieces make for it alone, is the output of one: of a feed-forward that
    is written out in the block, or of a fused branch where an attention leaves through it as well.

    Raises:
        AnatomyError: If there are none.
    """
    streams = call.streams(returns)
    widths = {tensor.shape[-1] for tensor in streams.values()}
    probe = Probe(call)
    inner = _inner(call, probe, streams)
    changing = depending(probe, call, streams)
    absorbed = {path for paths in inner.values() for path in paths}
    order = [piece.path for piece in call.pieces]
    sites: list[Site] = []
    for piece in call.pieces:
        whole = is_branch(piece.module) and piece.path not in absorbed and _makes_tokens(piece, streams)
        whole = whole and piece.path in changing  # not what only embeds a condition
        if not (whole or piece.path in inner):
            continue
        paths = inner.get(piece.path, ())
        sites.append(Site(branch=_kind(piece, paths, call, widths), module=piece.path, inner=paths))
    if not sites:
        raise AnatomyError(f"{call.path}: no attention or feed-forward was called in this block")
    if len(sites) == 1 and sites[0].branch == "attn" and not sites[0].inner:
        # An attention and nothing beside it: the MLP is inside.
        sites = [replace(sites[0], branch="fused")]
    return _named(sorted(sites, key=lambda site: order.index(site.entrance)), call, streams)


def _makes_tokens(piece: PieceCall, streams: Mapping[str, Tensor]) -> bool:
    """Whether a piece returned tokens of the width of a stream.

    In a row, as a picture with its channels first, or with the heads of an attention apart.
    """
    widths, rank = {tensor.shape[-1] for tensor in streams.values()}, min(tensor.ndim for tensor in streams.values())
    shape = tuple(piece.outputs[0].shape) if piece.outputs else ()
    heads = len(shape) == 4 and is_attention(piece.module) and shape[2] * shape[3] in widths
    return (len(shape) >= rank and shape[-1] in widths) or (len(shape) >= 4 and shape[1] in widths) or heads


def wrappers(call: BlockCall, returns: Returns) -> set[str]:
    """Return the pieces of a block that all its streams go through: layers with a branch and its residual inside."""
    streams = call.streams(returns)
    if not streams:
        return set()
    probe, lost = Probe(call), {name: nan_like(value) for name, value in streams.items()}
    return {
        piece.path
        for piece in call.pieces
        if is_branch(piece.module)
        and any(True for _ in piece.module.children())
        and _makes_tokens(piece, streams)
        and same(probe.run([piece.path]), probe.run([piece.path], arguments=lost))
    }


def _inner(call: BlockCall, probe: Probe, streams: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return the bare matrices that are the output of a branch, each with the pieces that feed nothing else."""
    order = [piece.path for piece in call.pieces]
    bare = [piece for piece in call.pieces if is_matrix(piece.module) and _makes_tokens(piece, streams)]
    if not bare:
        return {}
    made = {piece.path: piece.module for piece in call.pieces}
    found: dict[str, tuple[str, ...]] = {}
    absorbed: set[str] = set()
    for piece in reversed(bare):
        if piece.path in absorbed or carries(probe, piece.path, streams):
            continue
        earlier = [path for path in order[: order.index(piece.path)] if path not in absorbed]
        paths = feeding_only(probe, piece.path, earlier)
        if any(count_matrices(module) for module in (made[path] for path in paths)):
            found[piece.path] = paths
            absorbed.update(paths)
    return found


def _kind(piece: PieceCall, inner: tuple[str, ...], call: BlockCall, widths: set[int]) -> str:
    feeding = [other for other in call.pieces if other.path in inner and count_matrices(other.module)]
    attentions = [other for other in feeding if is_called_attention(other.path, other.module)]
    if len(attentions) == 1 and len(feeding) == 1:  # its output projection stands outside of it
        piece = attentions[0]
    elif attentions:
        return "fused"
    if not is_called_attention(piece.path, piece.module):
        return "mlp"
    if sum(out.shape[-1] in widths for out in piece.outputs) > 1:
        return "joint_attn"
    return "attn" if _mixes(piece) else "cross_attn"


def _mixes(piece: PieceCall) -> bool:
    """Whether a token that enters reaches what leaves for another one; in a cross-attention none does."""

    width = 0

    def poison(tokens: Tensor) -> Tensor:
        nonlocal width
        width, poisoned = tokens.shape[-1], tokens.clone()
        poisoned[(0,) * (tokens.ndim - 1)] = torch.nan
        return poisoned

    with torch.no_grad():
        out = piece.again(poison)
    made = out[0] if isinstance(out, (tuple, list)) else out
    return bool(made.isnan().sum() > max(width, made.shape[-1]))  # more than one token


def _named(sites: list[Site], call: BlockCall, streams: dict[str, Tensor]) -> tuple[Site, ...]:
    """Tell sites of one kind in one block apart: `mlp` and `mlp.context`.

    By what the names of their modules add; calls of one module by the stream whose tokens they make.
    """
    named: list[Site] = []
    for site in sites:
        alike = [other for other in sites if other.branch == site.branch]
        branch = site.branch
        if len(alike) > 1:
            name, _, turn = site.module.rpartition(".")[2].partition(TURN)
            rest = KIND_WORDS.sub("", name).strip("_") or (_stream_of(site, call, streams) if turn else "")
            taken = {other.branch for other in named}
            branch = f"{branch}.{rest}" if rest else branch
            if branch in taken:
                branch = f"{site.branch}.{turn.partition('/')[0] or name}"
        named.append(replace(site, branch=branch))
    return tuple(named)


def _stream_of(site: Site, call: BlockCall, streams: dict[str, Tensor]) -> str:
    """Return what tells the stream that a site makes tokens for from the main one; empty for that, or if unknown."""
    made = next(piece.outputs[0] for piece in call.pieces if piece.path == site.module)
    found = [name for name, tensor in streams.items() if tensor.shape[1] == made.shape[1]]
    if len(found) != 1:
        return ""
    return "context" if found[0] == "encoder_hidden_states" else found[0].replace("hidden_states", "").strip("_")
