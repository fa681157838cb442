"""The sections of the report: each one question, laid out from what the study found."""

from collections.abc import Sequence
from functools import partial

from attention_drift.arms import ARMS, DEPTH, DEPTH_ARMS, MTP_ARMS, OTHER_DEPTHS
from attention_drift.claims import (
    BOTH,
    PRE,
    beyond,
    claims,
    forced,
    growth,
    kept,
    length,
    mass,
    mtp_claims,
)
from attention_drift.findings import (
    Arm,
    Factors,
    Figure,
    Study,
    compare,
    product,
    ratio,
    share,
    to_the,
)
from attention_drift.measure_all import DEEP, DRAFTS, INTERVENTIONS, deep
from attention_drift.tables import (
    beside,
    bounded,
    judged,
    seen,
    table,
    tallied,
    told,
)
from attention_drift.texts import HELD_OUT
from mlx_drift.measure.acceptance.context import condition
from mlx_drift.measure.inside.drift import RECENT
from mlx_drift.watch.sums import CLASSES

GROUPS = {"Which norm": (PRE, tuple(ARMS)), "MTP heads": ("mtp_post", tuple(MTP_ARMS))}
"""Arms that are compared, and with which of them; a group without drafters is left out."""


SHOWN = 1, 2, 4, 8, 16
"""Chain steps in tables."""


LEAST_SAID = 10
"""Tokens of an answer, on average, below which a wording tells nothing of drafts."""


COMPARED: dict[str, Figure] = {
    f"growth: RMS {DEEP} ÷ 1": growth,
    f"own drafts, step {DEEP}": partial(mass, "drafts"),
    f"τ, {DRAFTS} drafts": partial(length, HELD_OUT),
    f"τ, {DEEP} drafts": partial(length, deep(HELD_OUT)),
    f"conditional, {DEPTH + 1}–{DEEP}": beyond,
    f"forced, {DEPTH + 1}–{DEEP}": forced,
}


def of_claims(*studies: Study) -> str:
    """The claims of the abstract beside what was found, a column for each target."""
    found = [{one.says_what: one for one in claims(study, spoken(study))} for study in studies]
    asked = dict.fromkeys(what for claims_ in found for what in claims_)
    counted = "\n".join(
        f"- {study.setting.name}: {len(of)} figures, {tallied(of.values())}"
        for study, of in zip(studies, found, strict=True)
    )
    columns = [part for study in studies for part in (study.setting.name, "verdict")]
    rows = []
    for what in asked:
        cells = []
        for of in found:
            cells += told(of[what]) if what in of else ("–", "–")
        rows.append((*what.split("\n"), *cells))
    return f"""## The abstract's claims

What the paper reports is in brackets behind a claim. Behind *not settled* stands half the width of
the interval, and how many prompts would settle it if the figure stays what it is; where trainings
disagree no number would.

{counted}

{table(("claim", "figure", *columns), rows)}"""


def of_figure_7(study: Study) -> str:
    """The paper's MTP head beside ours."""
    return f"""### The paper's figure 7

It shows one MTP head, Qwen3.5 9B's own, whose recycled state is normed. Step 1 is the last one
before drafting begins.

{beside(mtp_claims(study))}"""


def of_group(study: Study, title: str) -> str:
    """What each arm of a group is, and in parts of its base."""
    base, names = GROUPS[title]
    arms = {name: arm for name in names if (arm := study.arm(name, DEPTH)).drafters}
    own = [
        (f"`{name}`", *(seen(compare(figure, arm)) for figure in COMPARED.values()))
        for name, arm in arms.items()
    ]
    of_base = [
        (
            f"`{name}`",
            *(judged(compare(ratio(figure), arm, arms[base])) for figure in COMPARED.values()),
        )
        for name, arm in arms.items()
        if name != base
    ]
    head = ["arm", *COMPARED]
    return f"""## {title}

{table(head, own)}

In parts of `{base}`:

{table(head, of_base)}"""


def effect(figure: Figure, *signs: int) -> Figure:
    """Returns the effect of two switches in a two by two design, as a factor.

    Args:
        figure: Of one arm.
        signs: Those with which (no switch, the first, the second, both) count.
    """

    def factors(*arms: Arm) -> Factors:
        return [
            factor
            for arm, sign in zip(arms, signs, strict=True)
            for factor in to_the(sign / 2, figure(arm))
        ]

    return factors


def step_table(study: Study, names: Sequence[str]) -> str:
    """Lays out each arm step by step."""
    rows = []
    for name in names:
        arm = study.arm(name, DEPTH)
        columns = [share(arm.drift(*of)) for of in (("rms",), ("cosine",), ("entropy",))]
        columns += [share(arm.drift("attention", kind)) for kind in CLASSES]
        columns.append(share(arm.drift("rms", column="teacher_forced")))
        columns.append(share(arm.drift("agreement", column="teacher_forced")))
        for step in SHOWN:
            figures = (f"{column[step - 1].value:.2f}" for column in columns)
            rows.append((f"`{name}`", str(step), *figures))
    return table(
        ["arm", "step", "RMS", "cosine", "entropy", *CLASSES, "forced: RMS", "right"], rows
    )


def of_steps(study: Study, names: Sequence[str]) -> str:
    """Each arm step by step."""
    return f"""## Step by step

*Cosine* is that of the recycled state to the one before, *entropy* that of attention, in nats; the
classes of keys are those of `mlx-drift drift`, *recent* the last {RECENT} committed tokens.

{step_table(study, names)}

![growth of the recycled state](figures/growth.png)

![attention by step](figures/attention.png)"""


def of_two_norms(study: Study) -> str:
    """What each of the two norms of EAGLE-3.1 does, whatever the other does."""
    arms = [study.arm(name, DEPTH) for name in (PRE, "norm_output", "fc_norm", BOTH)]
    effects = {
        "`norm_output`": (-1, 1, -1, 1),
        "`fc_norm`": (-1, -1, 1, 1),
        "both, beyond what each does": (1, -1, -1, 1),
    }
    rows = []
    for name, signs in effects.items():
        found = [compare(effect(figure, *signs), *arms) for figure in COMPARED.values()]
        rows.append((name, *map(judged, found)))
    return f"""## The two norms apart

What turning one on multiplies a figure by, a geometric mean of with and without the other. The last
row is the square root of how many times more one does where the other is on.

{table(["turned on", *COMPARED], rows)}"""


def of_depths(study: Study) -> str:
    """How deep the train-time test is."""
    rows = [
        (f"`{name}`", str(depth), *(seen(compare(figure, arm)) for figure in COMPARED.values()))
        for name in DEPTH_ARMS
        for depth in sorted({DEPTH, *OTHER_DEPTHS})
        if (arm := study.arm(name, depth)).drafters
    ]
    return f"""## Depth of the train-time test

{table(["arm", "depth", *COMPARED], rows)}

![teacher-forced drafts that are right, by step](figures/depth.png)"""


def said(study: Study, name: str, nth: int = 1) -> float:
    """How many tokens the target says to every nth prompt, on average."""
    tokens = study.about[name]["answer_tokens"][::nth]
    return sum(tokens) / len(tokens)


def spoken(study: Study) -> list[str]:
    """The wordings to which the target says enough to tell of drafts."""
    return [name for name in study.setting.others if said(study, name) >= LEAST_SAID]


def of_wordings(study: Study, names: Sequence[str]) -> str:
    """Acceptance under other wordings."""
    nth, wordings = study.setting.every_perturbed, study.setting.others
    arms = [study.arm(name, DEPTH) for name in names]
    usual = partial(length, HELD_OUT, nth=nth)
    rows = [("as usual", said(study, HELD_OUT, nth), usual)]
    rows += [(name, said(study, name), partial(length, name)) for name in wordings]
    pre, *others = arms
    of_pre = [
        (
            name,
            *(judged(compare(ratio(partial(kept, name, nth)), arm, pre)) for arm in others),
        )
        for name in spoken(study)
    ]
    asked = len(study.about[wordings[0]]["answer_tokens"])
    return f"""## Other wordings

τ at {DRAFTS} drafts, {asked} questions. *Tokens* is how many the target says,
on average; where that is less than {LEAST_SAID}, nothing is made of it.

{
        table(
            ["wording", "tokens", *(f"`{name}`" for name in names)],
            [
                (name, f"{tokens:.0f}", *(seen(compare(figure, arm)) for arm in arms))
                for name, tokens, figure in rows
            ],
        )
    }

What share of its usual τ an arm keeps, in parts of what `{pre.name}` keeps:

{table(["wording", *(f"`{arm.name}`" for arm in others)], of_pre)}

![acceptance by wording](figures/wordings.png)"""


def of_contexts(study: Study, names: Sequence[str]) -> str:
    """Acceptance in long contexts."""
    pre, setting = study.arm(PRE, DEPTH), study.setting
    rows = []
    for name, (tokens, attention) in setting.long.items():
        arms = [study.arm(one, DEPTH) for one in names]
        found = [seen(compare(partial(length, name), arm)) for arm in arms]
        rows.append((str(tokens), attention, *found))
    both = study.arm(BOTH, DEPTH)
    ratios = [
        (
            str(tokens),
            *(
                judged(compare(ratio(partial(length, condition(tokens, one))), both, pre))
                for one in setting.seen
            ),
        )
        for tokens in setting.lengths
    ]
    return f"""## Long contexts

τ at {DRAFTS} drafts behind long dialogues; drafters were trained on rows of {setting.row} tokens. A
window has {setting.window} tokens.

{table(["tokens", "the drafter sees", *(f"`{name}`" for name in names)], rows)}

`{BOTH}` ÷ `{PRE}`:

{table(["tokens", *setting.seen], ratios)}

![acceptance by context](figures/contexts.png)"""


def of_real(study: Study) -> str:
    """The real target's drafters, in every condition."""
    pre, both = study.arm(PRE, DEPTH), study.arm(BOTH, DEPTH)
    setting, asked = study.setting, len(study.about[HELD_OUT]["answer_tokens"])
    tokens, seeds = study.drafters[0]["tokens"], len(pre.drafters)
    nth = dict.fromkeys((*setting.others, *INTERVENTIONS), setting.every_perturbed)
    nth |= dict.fromkeys(setting.long, setting.every_long)
    rows = []
    for one, prompts in ((HELD_OUT, 1), (deep(HELD_OUT), 1), *nth.items()):
        figure = partial(length, one)
        own = [bounded(compare(figure, arm).all) for arm in (pre, both)]
        ratios = [judged(compare(ratio(figure), both, pre))]
        if prompts > 1:
            ratios.append(judged(compare(ratio(partial(kept, one, prompts)), both, pre)))
        rows.append((one, *own, *ratios, *["–"] * (2 - len(ratios))))
    over = f"`{BOTH}` ÷ `{PRE}`"
    return f"""## {setting.name}

A real target: the first turns of {asked} questions of MT-Bench and GSM8K, and the two heads of
[`../smollm2`](../smollm2), {seeds} training{"s" * (seeds > 1)} each, of {tokens / 1e6:.2f} million
answer tokens.
τ at {DRAFTS} drafts; one question in {setting.every_perturbed} in other wordings, one in
{setting.every_long} behind long dialogues. Its own template is ChatML.

{table(["asked", f"`{PRE}`", f"`{BOTH}`", over, f"share that is kept, {over}"], rows)}

{step_table(study, DEPTH_ARMS)}"""


def of_interventions(study: Study, names: Sequence[str]) -> str:
    """What is left when the recycled state is meddled with."""
    nth = study.setting.every_perturbed
    rows = [
        (
            f"`{name}`",
            *(
                judged(compare(partial(kept, one, nth), study.arm(name, DEPTH)))
                for one in INTERVENTIONS
            ),
        )
        for name in names
    ]
    return f"""## Meddling with the recycled state

What share of its τ a drafter keeps, without being trained anew, if its recycled state is scaled to
the size of the fused input (`pin`), to RMS 1 (`normalize`), or gets noise of half its size.

{table(["arm", *INTERVENTIONS], rows)}"""


def of_all(study: Study) -> str:
    """Every drafter."""
    rows = []
    for one in sorted(study.drafters, key=lambda d: (d["depth"], d["arm"], d["seed"])):
        arm = Arm(one["arm"], one["depth"], {one["seed"]: one})
        figures = [product(figure(arm)) for figure in COMPARED.values()]
        losses = " ".join(f"{loss:.2f}" for loss in one["loss"])
        name = f"`{one['arm']}`"
        rows.append((name, str(one["depth"]), str(one["seed"]), losses, *map(bounded, figures)))
    return f"""## All {len(rows)} drafters

*Loss* is the mean of the last steps of training, by step of the chain.

{table(["arm", "depth", "seed", "loss", *COMPARED], rows)}"""
