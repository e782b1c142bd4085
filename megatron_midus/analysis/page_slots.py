"""Section of the report: what slots fire on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_midus.analysis.slots import BlockSlots, Context, SlotReadings
from megatron_midus.analysis.study import Study
from megatron_midus.report.page import Page


def add(page: Page, study: Study, slots: dict[int, BlockSlots]) -> None:
    page.heading("What slots fire on")
    page.paragraph(
        "For a slot and the head that reads it: the tokens at which it is read, with their share of the weight, and the "
        "places where it weighed most. The marked token is the last one that the model had read; what follows it in grey "
        "is the token that it had to predict."
    )
    page.paragraph(
        "Bits: how much a read tells about the token, against how often the token stands in the text; 0 = the slot fires "
        "on anything. Slots with few reads look selective by chance, so rarely read ones are not shown. ␣ is a space, ⏎ a "
        "line break.",
        is_note=True,
    )
    for block, entry in slots.items():
        page.subheading(f"Block {block}")
        if entry.mean_information is not None:
            page.paragraph(f"Mean over the slots that are read often, by weight: {entry.mean_information:.2f} bits.", is_note=True)  # fmt: skip
        page.fragment(_listing("Most used", entry.most_used, is_open=block == min(slots)))
        page.fragment(_listing("Most selective", entry.most_selective, is_open=block == min(slots)))


def _listing(title: str, slots: Sequence[SlotReadings], *, is_open: bool) -> str:
    inner = "\n".join(map(_slot, slots)) or '<p class="note">No slot was read often enough.</p>'
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(title)} ({len(slots)})</summary>\n{inner}\n</details>"
    )


def _slot(slot: SlotReadings) -> str:
    head = (
        f"head {slot.head}, slot {slot.slot} (row {slot.row}, column {slot.col}): {slot.reads:,} reads, weight "
        f"{slot.mass:,.1f}, {slot.num_tokens} tokens, {slot.information:.2f} bits"
    )
    tokens = " ".join(f"<code>{escape(visible(token))}</code>{share:.0%}&ensp;" for token, share in slot.tokens)
    contexts = "\n".join(map(_context, slot.contexts))
    return f'<div class="slot"><div class="note">{escape(head)}</div><div>{tokens}</div>\n{contexts}</div>'


def _context(context: Context) -> str:
    before, after = visible(context.before, spaces=False), visible(context.after, spaces=False)
    return (
        f'<div class="context">{context.weight:.2f}&ensp;{escape(before)}<mark>{escape(visible(context.token))}</mark>'
        f'<span class="note">{escape(after)}</span></div>'
    )


def visible(text: str, *, spaces: bool = True) -> str:
    """Line breaks and, in single tokens, spaces as signs of their own."""
    text = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    return text.replace(" ", "␣") if spaces else text
