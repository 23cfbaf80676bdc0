"""The segments of an MLP memory's backward that are rerun together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call

__all__ = ["Groups"]

#: chunks times heads of a group, at least: several for every multiprocessor of the largest chips
MIN_GROUP = 1024


class Groups(NamedTuple):
    """The segments of each group: about an equal share of every sequence, so that the chains of all sequences run at once. Computed
    without device synchronisation; a group of packed sequences has places that may not be used."""

    segments: Tensor  # [groups, places, 2] int64   sequence and number of a segment; a number beyond the last for an unused place
    places: Tensor  # [groups, N, 2] int64   the places of every sequence: the first, and that after its last
    slots: Tensor  # [groups, places] int64   of their checkpoints

    @staticmethod
    def of(call: Call, every: int) -> Groups:
        size, device, (_, tokens, heads, _) = call.chunk_size * every, call.q.device, call.q.shape
        sequences = call.state.dual[0].shape[0]
        longest, share = -(-tokens // size), -(-MIN_GROUP // (every * heads))  # of a sequence, at most; of a group, at least
        if call.cu_seqlens is None:
            each = min(longest, -(-share // sequences))
            groups, counts = -(-longest // each), torch.full((sequences,), longest, device=device)
            first, places, slots = torch.arange(sequences, device=device) * longest, sequences * -(-longest // groups), sequences * longest
        else:
            slots = tokens // size + sequences
            counts = (call.cu_seqlens.to(torch.int64).diff() + size - 1) // size
            groups = max(1, slots // share)
            first, places = counts.cumsum(0) - counts, slots // groups + sequences
        bounds = counts * torch.arange(groups + 1, device=device)[:, None] // groups  # [groups + 1, N]
        stop = (bounds[1:] - bounds[:-1]).cumsum(1)
        begin = stop - (bounds[1:] - bounds[:-1])
        place = torch.arange(places, device=device).expand(groups, places).contiguous()
        owner = torch.searchsorted(stop, place, right=True)
        used, owner = owner < sequences, owner.clamp_max(sequences - 1)
        number = torch.where(used, place + (bounds[:-1] - begin).gather(1, owner), longest)
        return Groups(torch.stack([owner, number], -1), torch.stack([begin, stop], -1), (first[owner] + number).clamp_max(slots - 1))
