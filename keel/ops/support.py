"""What top-p and top-k leave of a vocabulary: log-probs over what an engine left, and a cut of one's own to compare.

A token drawn from a cut distribution has the log-prob of softmax over what was left (its support), not over the whole
vocabulary. Two sides that make the cut each for itself agree but for tokens at its very edge, where a rounding error
moves a token in or out and the log-prob of every other one with it. So the support travels with the token, and the cut
made anew only tells how often it would have come out otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenSupport:
    """What each of T labels was chosen from: label t from `ids[offsets[t]:offsets[t + 1]]`; none: nothing was cut.

    The label itself must be among them: otherwise its log-prob is -inf.
    """

    ids: torch.Tensor  # [M] int32
    offsets: torch.Tensor  # [T + 1] int64

    def inside(self, start: int, stop: int, num_ids: int, *, first_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Of labels `start` to `stop - 1`: which were cut `[n]`, and what was left to them `[n, num_ids]`; both bool.

        The ids asked about are those from `first_id` on. A row that was not cut has nothing inside.
        """
        bounds = self.offsets[start : stop + 1]
        counts = bounds.diff()
        ids = self.ids[int(bounds[0]) : int(bounds[-1])].long()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), counts, output_size=len(ids))
        here = (ids >= first_id) & (ids < first_id + num_ids)
        inside = torch.zeros(len(counts), num_ids, dtype=torch.bool, device=ids.device)
        inside[rows[here], ids[here] - first_id] = True
        return counts > 0, inside


def cut_logits(logits: torch.Tensor, support: TokenSupport, start: int, *, first_id: int = 0) -> torch.Tensor:
    """`logits [n, b]` of labels from `start` and ids from `first_id` on, -inf outside their support; in place."""
    cut, inside = support.inside(start, start + logits.shape[0], logits.shape[1], first_id=first_id)
    return logits.masked_fill_(cut[:, None] & ~inside, -torch.inf)


def check_support(support: TokenSupport, num_labels: int, vocab_size: int) -> None:
    """Raises ValueError if `support` is not that of `num_labels` labels of a vocabulary of `vocab_size`."""
    offsets, ids = support.offsets, support.ids
    if tuple(offsets.shape) != (num_labels + 1,) or ids.dim() != 1 or int(offsets[-1]) != ids.shape[0]:
        raise ValueError(
            f"support: got offsets {tuple(offsets.shape)} up to {int(offsets[-1]) if offsets.numel() else 0} and ids "
            f"{tuple(ids.shape)}; needs [{num_labels + 1}] offsets, the last of which is the number of ids"
        )
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"support: got ids {int(ids.min())} to {int(ids.max())} in a vocabulary of {vocab_size}; engine and "
            "learner must run the same model"
        )


def own_cut(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the settings leave of `scaled [n, V]` (logits over temperature), with each label inside: `[n, V]` bool.

    `top_k [n]` integer, 0 cuts nothing; `top_p [n]`, 1 cuts nothing. As an engine cuts: first to the k most likely (and
    what ties with the last of them), then to the fewest of these whose share of their sum reaches top_p. Float64.
    """
    ordered, order = torch.sort(scaled.double(), dim=-1, descending=True, stable=True)
    vocabulary = ordered.shape[-1]
    kept = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, kept[:, None] - 1), -torch.inf)
    shares = torch.softmax(ordered, dim=-1)
    before = torch.cumsum(shares, dim=-1) - shares
    inside = (shares > 0) & ((before < top_p[:, None]) | (top_p >= 1.0)[:, None])
    left = torch.zeros_like(inside).scatter_(-1, order, inside)
    return left.scatter_(-1, labels[:, None], True)


def differs_from_own_cut(
    scaled: torch.Tensor, support: TokenSupport, start: int, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Whether the settings would leave another set of `scaled [n, V]` than labels from `start` on had: `[n]` bool.

    Without sorting: a set is the right one if nothing outside is likelier than anything inside, and if it reaches top_p
    with its least likely token and not without. False where nothing was cut.
    """
    vocabulary = scaled.shape[1]
    cut, inside = support.inside(start, start + scaled.shape[0], vocabulary)
    wide = scaled.double()
    largest = min(int(top_k.max()), vocabulary) if top_k.numel() else 0
    if largest > 0:
        highest = torch.topk(wide, largest, dim=-1).values
        last = highest.gather(-1, (top_k.clamp(max=vocabulary) - 1).clamp(min=0)[:, None])
        wide = wide.masked_fill((top_k > 0)[:, None] & (wide < last), -torch.inf)
    shares = torch.softmax(wide, dim=-1)
    least = shares.masked_fill(~inside, torch.inf).amin(-1)
    outside = shares.masked_fill(inside, 0.0).amax(-1)
    sum_inside = (shares * inside).sum(-1)
    too_many = (least <= 0) | ((top_p < 1.0) & (sum_inside - least >= top_p))
    too_few = (outside > 0) & ((top_p >= 1.0) | (sum_inside < top_p))
    return cut & ((outside > least) | too_many | too_few)
