"""Interventions: what holds for any weights on both engines, which engine runs, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
from engine_cases import (
    MODELS,
    N_LAYERS,
    N_SHARED,
    RESID,
    SITES,
    assert_same,
    branches,
    embedded,
    heard,
    model_of,
    noise,
    state,
    unit,
)
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from reference import tiny_hf
from torch.testing import assert_close

from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Plan, run_branches
from lalm_lens.errors import HookError, InputError
from lalm_lens.inputs import Embedded
from lalm_lens.interventions import BY_HEAD, Add, Knockout, Patch, Recompute, Scale, ScaleAttention
from lalm_lens.loading import from_hf
from lalm_lens.prompts import Position, Prompt
from lalm_lens.readouts import Logits, LogProbs, Resid, Score
from lalm_lens.runs import OWN, Run, Source

BOTH = pytest.mark.parametrize("engine", ["sweep", "hooks"])
N_POS = 18


@pytest.fixture(scope="module", params=["grouped", "windows in turn"])
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def runs():
    return embedded(1), embedded(2)


def found(model, its, engine, readout=LogProbs()):  # noqa: B008  it is frozen
    outcome = run_branches(model, its, readout, engine=engine)
    assert outcome.engine == engine
    return outcome


# --- identities ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("site", RESID)
def test_all_positions_patched_at_any_layer_give_the_other_run(model, runs, site, engine):
    base, clean = runs
    its = branches(base, *(Patch(site, layer, range(N_POS), Source(clean)) for layer in range(N_LAYERS)))
    expected = found(model, [Branch(clean)], engine).values.expand(N_LAYERS, -1, -1)
    assert_close(found(model, its, engine).values, expected)


@BOTH
@pytest.mark.parametrize("site", SITES)
def test_what_both_runs_share_changes_nothing(model, runs, site, engine):
    base, clean = runs
    changes = [Patch(site, layer, range(N_SHARED), Source(clean)) for layer in range(N_LAYERS) if site != "pattern"]
    changes += [Patch(site, layer, (2, -1), Source(base)) for layer in range(N_LAYERS)]
    outcome = found(model, branches(base, *changes), engine)
    assert_close(outcome.values, outcome.base)
    if engine == "sweep" and site != "pattern":
        assert torch.equal(outcome.values, outcome.base)


@BOTH
def test_after_the_last_block_only_the_last_position_is_read(model, runs, engine):
    base, clean = runs
    without, with_it = (Patch("resid_post", N_LAYERS - 1, its, Source(clean)) for its in (range(N_POS - 1), (4, -1)))
    outcome = found(model, branches(base, without, with_it), engine)
    assert_close(outcome.values[0], outcome.base[0])
    assert_close(outcome.values[1], found(model, [Branch(clean)], engine).values[0])


@BOTH
def test_changes_of_nothing_change_nothing(model, runs, engine):
    base, _ = runs
    nothing = [
        Patch("resid_post", 2, (-1, 9), Source(base)),
        Add("resid_post", 3, (-1, 12), Source(OWN, layer=1), factor=0.0),
        Add("z", 1, (5, 6), noise(2, 4, 16), factor=0.0),
        Scale("k", 1, (7,), factor=1.0),
        Knockout((0, 2), (3,), (4, 17)),
        ScaleAttention((0, 2), (7,), (4, 5), factor=1.0),
        Recompute("resid_pre", 0, range(N_POS)),
        Recompute("q", 2, (-1,)),
    ]
    outcome = found(model, branches(base, *nothing), engine)
    assert_close(outcome.values, outcome.base)


def test_changes_of_none_of_its_parts_are_refused():
    for what, change in {
        "heads": lambda: Scale("v", 1, (7,), factor=0.0, heads=()),
        "neurons": lambda: Scale("post", 1, (7,), factor=0.0, neurons=()),
        "layers": lambda: Knockout((), (-1,), (4,)),
    }.items():
        with pytest.raises(InputError, match=f"no {what} changes nothing"):
            change()
    with pytest.raises(InputError, match=r"factor above 0, got 0\.0: a `Knockout`"):
        ScaleAttention((1,), (-1,), (4,), factor=0.0)


@BOTH
def test_back_patching_a_state_onto_itself_changes_nothing(model, runs, engine):
    base, _ = runs
    its = [Patch("resid_post", layer, (-3,), Source(base, layer=layer)) for layer in range(N_LAYERS)]
    onto_another = Patch("resid_post", 1, (-3,), Source(base, layer=3))
    outcome = found(model, branches(base, *its, onto_another), engine)
    assert_close(outcome.values[:-1], outcome.base[:-1])
    assert (outcome.values[-1] - outcome.base[-1]).abs().max() > 1e-2


@BOTH
def test_a_source_says_where_its_states_are(runs, engine):
    """By default where the change itself is, counted in the source's own run; else by layer, positions and site."""
    model, base, longer = model_of("grouped"), runs[0], embedded(3, 23)
    with torch.no_grad():
        cache, own = (model.run_with_cache(longer.inputs)[1] for _ in range(2))
    own = own.remove_batch_dim() if engine == "hooks" else own
    pairs = [
        (Source(longer), (-1, -3), cache["resid_post", 2][0, [-1, -3]]),
        (Source(longer, layer=1, positions=(22, 3)), (-1, -3), cache["resid_post", 1][0, [22, 3]]),
        (Source(longer, site="mlp_out"), (5, 6), cache["mlp_out", 2][0, [5, 6]]),
        (Source(own, positions=(-1, 20)), (5, 6), cache["resid_post", 2][0, [-1, 20]]),
    ]
    its = [Patch("resid_post", 2, at, value) for source, at, tensor in pairs for value in (source, tensor)]
    its += [Patch("z", 1, (4,), Source(own, positions=(-2,))), Patch("z", 1, (4,), cache["z", 1][0, [-2]])]
    values = found(model, branches(base, *its), engine).values
    assert_close(values[::2], values[1::2])
    assert (values[::2].diff(dim=0).abs().amax((1, 2)) > 1e-3).all()


@BOTH
def test_regions_are_looked_up_in_the_prompt_of_their_own_run(engine):
    def told(run, at):
        names = ["object" if pos == at else "template" for pos in range(run.n_pos - run.n_pad)]
        return Run(run.inputs, Prompt((0,) * len(names), tuple(Position("a", name) for name in names)))

    model, base, clean = model_of("grouped"), told(heard((0.5, 0.25), row=1), 4), told(heard((0.5,), seed=3), 7)
    named = Patch("resid_post", 1, "object", Source(clean))
    counted = Patch("resid_post", 1, (4 + base.n_pad,), Source(clean, positions=(7,)))
    knocked = Knockout((1, 2), (-1,), "object"), Knockout((1, 2), (-1,), (4 + base.n_pad,))
    values = found(model, branches(base, named, counted, *knocked), engine).values
    assert_close(values[::2], values[1::2])
    assert (values[0] - values[2]).abs().max() > 1e-3


# --- which engine ran ----------------------------------------------------------------------------------------


def silenced(state, hook):
    return 0 * state


def test_auto_runs_the_sweep_unless_it_lacks_something(runs):
    base, clean = runs
    model = from_hf(tiny_hf(7))
    patch = Patch("resid_post", 1, (-1,), Source(clean))
    function = ("blocks.1.attn.hook_z", silenced)
    assert run_branches(model, branches(base, patch)).engine == "sweep"
    outcome = run_branches(model, [Branch(base, (patch, function)), Branch(base, (patch,))])
    assert outcome.engine == "hooks"
    assert "engine 'hooks'" in repr(Plan(model, [Branch(base, (function,))]))
    zeroed = Scale("z", 1, range(N_POS), factor=0.0)
    assert_close(outcome.values, run_branches(model, [Branch(base, (patch, zeroed)), Branch(base, (patch,))]).values)
    with pytest.raises(InputError, match=r'a function on blocks.1.attn.hook_z: engine="hooks"'):
        Plan(model, [Branch(base, (patch, function))], engine="sweep")


def test_a_pattern_of_a_padded_prompt_may_not_look_at_padding():
    model, padded, other = model_of("grouped"), heard((0.5, 0.25), row=1), heard((0.5, 0.25), row=1, seed=5)
    keys = (padded.n_pad - 2, padded.n_pad + 4, padded.n_pad - 1, padded.n_pad + 1)
    its = branches(
        padded,
        Patch("pattern", 1, (-1, padded.n_pad + 3), Source(other)),
        Patch("pattern", 2, (-2,), Source(other), heads=(1, 3), keys=keys),
        Scale("pattern", 0, (-1, padded.n_pad - 1), factor=0.5),
        Scale("pattern", 1, (-1,), factor=0.0, keys=keys[::-1]),
        Scale("pattern", 1, (-1,), factor=0.0, keys=keys[::2][:1]),
    )
    assert assert_same(model, its).n_skipped == 1  # what looks at padding alone
    weighed = branches(padded, Patch("pattern", 1, (-1,), state(model, "pattern", 1, padded.n_pos)))
    assert run_branches(model, weighed).engine == "hooks"
    with pytest.raises(InputError, match="lets a query look at padding"):
        Plan(model, weighed, engine="sweep")


@pytest.mark.parametrize("name", ["blocks.2.mlp.hook_pre", "hook_embed", "ln_final.hook_scale"])
@pytest.mark.parametrize("attach", ["add_hook", "add_perma_hook"])
def test_the_sweep_refuses_hooks_and_the_other_engine_runs_them(runs, name, attach):
    base, clean = runs
    model = from_hf(tiny_hf(7))
    its = branches(base, Patch("resid_post", 1, (-1,), Source(clean)))
    before = Plan(model, its, engine="sweep")
    plain = before.run()
    getattr(model, attach)(name, lambda state, hook: 2 * state)
    with pytest.raises(HookError, match=rf"{name} would be part of every run.*reset_hooks\(including_permanent=True\)"):
        Plan(model, its, engine="sweep")
    with pytest.raises(HookError, match="would be part of every run"):
        before.run()
    outcome = run_branches(model, its)
    assert outcome.engine == "hooks"
    assert (outcome.values - plain.values).abs().max() > 1e-3
    model.reset_hooks(including_permanent=True)
    assert run_branches(model, its, engine="sweep").engine == "sweep"


def test_nothing_stays_attached(runs):
    model, (base, clean) = from_hf(tiny_hf(7)), runs
    its = [Patch("z", 1, (-1,), Source(clean)), Knockout((1,), (-1,), (3,)), Scale("q", 0, (9,), factor=2.0)]
    for engine in ("sweep", "hooks"):
        run_branches(model, branches(base, *its), engine=engine)
        run_branches(model, branches(heard((0.3,)), Scale("adapter_out", 0, (1,), factor=0.0)), engine=engine)
        assert not model.list_hooks()
    with pytest.raises(InputError, match="does not fit"):
        run_branches(model, branches(base, Patch("resid_post", 1, (3,), noise(1, 5))), engine="hooks")
    assert not model.list_hooks()


def test_switches_of_the_model_change_nothing(runs):
    model, (base, clean) = from_hf(tiny_hf(7)), runs
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    assert_same(model, branches(base, *(Patch(site, 1, (-3,), Source(clean)) for site in ("z", "k", "resid_mid"))))


def test_bf16_is_as_close_as_the_hooks_are_to_themselves(runs):
    """Once with the fused kernel, once with explicit attention; what is read is float32."""
    base, clean = (Run(Embedded(run.inputs.embed.bfloat16(), run.inputs.attention_mask)) for run in runs)
    model = from_hf(tiny_hf(7)).to(torch.bfloat16)
    its = branches(base, *(Patch("resid_post", layer, (pos,), Source(clean)) for layer in (0, 1) for pos in range(18)))
    listening = tuple((f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pattern) for layer in range(N_LAYERS))
    explicit = [Branch(base, (*branch.changes, *listening)) for branch in its]
    swept, fused = (run_branches(model, its, engine=engine).values for engine in ("sweep", "hooks"))
    assert swept.dtype == fused.dtype == torch.float32
    own_gap = (run_branches(model, explicit).values - fused).abs().mean()
    gap = (swept - fused).abs().mean()
    print(f"bf16: {gap:.5f} from the hooks, which are {own_gap:.5f} from themselves")
    assert gap <= 1.5 * own_gap
    assert Plan(model, its, Logits()).run().values.dtype == torch.bfloat16


# --- what is refused -----------------------------------------------------------------------------------------

BASE, CLEAN, LONGER, PADDED = embedded(1), embedded(2), embedded(3, 23), heard((0.5, 0.25), row=1)
AUDIO = heard((0.3,))
RESID_POST = "blocks.1.hook_resid_post"
REFUSED = {
    "There are 4 layers in the decoder, counted from 0; got [4]": Patch("resid_post", 4, (3,), Source(CLEAN)),
    "There are 4 layers in the decoder, counted from 0; got [-1]": Scale("resid_post", -1, (3,), factor=0.0),
    "There are 4 layers, counted from 0; got [9]": Knockout((1, 9), (-1,), (3,)),
    "There are 4 heads, counted from 0; got [4]": Scale("q", 1, (3,), factor=0.0, heads=(1, 4)),
    "There are 2 heads, counted from 0; got [2]": Scale("k", 1, (3,), factor=0.0, heads=(2,)),
    "There are 4 heads, counted from 0; got [7]": Knockout((1,), (-1,), (3,), heads=(7,)),
    "There are 96 neurons, counted from 0; got [96]": Scale("post", 1, (3,), factor=0.0, neurons=(96, 3)),
    "There are 18 keys, counted from 0; got [18]": Scale("pattern", 1, (3,), factor=0.0, keys=(18,)),
    "from 0 to 17, or from the end from -1; got (18,)": Scale("resid_post", 1, (18,), factor=0.0),
    "from 0 to 17, or from the end from -1; got (-19,)": Scale("resid_post", 1, (-19,), factor=0.0),
    "different positions; got (17, -1)": Scale("resid_post", 1, (17, -1), factor=0.0),
    "from 0 to 17, or from the end from -1; got (30,)": Knockout((1,), (-1,), (30,)),
    "from 0 to 17, or from the end from -1; got (40,)": Knockout((1,), (40,), (3,)),
    "Give the run its prompt": Patch("resid_post", 1, "object", Source(CLEAN)),
    "2 states are to go to 1 positions": Patch("resid_post", 1, (3,), Source(CLEAN, positions=(3, 4))),
    "from 0 to 22, or from the end from -1; got (23,)": Patch("resid_post", 1, (3,), Source(LONGER, positions=(23,))),
    "shape (1, 5) does not fit states of shape (1, 1, 64)": Patch("resid_post", 1, (3,), noise(1, 5)),
    "shape (1, 4, 16) does not fit states of shape (1, 1, 2, 16)": Patch("k", 1, (3,), noise(1, 4, 16)),
    "shape (3, 1, 64) does not fit": Add("resid_mid", 1, (3,), noise(3, 1, 64)),
    "shape (1, 4, 17) does not fit": Patch("pattern", 1, (3,), noise(1, 4, 17)),
    "take its own resid_pre, resid_mid, resid_post from before the change, not resid_post of block 2": Add(
        "resid_post", 2, (3,), Source(OWN)
    ),
    "not resid_post of block 3": Add("resid_post", 2, (3,), Source(OWN, layer=3)),
    "not resid_mid of block 2": Add("attn_out", 2, (3,), Source(OWN, site="resid_mid")),
    "not z of block 1": Add("z", 2, (3,), Source(OWN, layer=1)),
    "does not hold blocks.1.hook_resid_post": Patch("resid_post", 1, (3,), Source({"hook_embed": noise(1, 18, 64)})),
    "does not hold blocks.1.attn.hook_z": Patch("z", 1, (3,), Source({}, positions=(4,))),
    "this cache holds 2": Patch("resid_post", 1, (3,), Source({RESID_POST: noise(2, 18, 64)})),
    "A cache has no regions": Patch("resid_post", 1, (3,), Source({RESID_POST: noise(1, 18, 64)}, positions="object")),
    "from 0 to 8, or from the end from -1; got (9,)": Patch(
        "resid_post", 1, (3,), Source({RESID_POST: noise(9, 64)}, positions=(9,))
    ),
    "from 0 to 8, or from the end from -1": Patch("resid_post", 1, (12,), Source({RESID_POST: noise(1, 9, 64)})),
    "indices from 0 on, got (-1,)": Scale("resid_post", 1, (-1,), factor=0.0, stack="audio_encoder"),
    "There are 2 layers in the audio_encoder": Scale("resid_post", 2, (1,), factor=0.0, stack="audio_encoder"),
    "4 heads, counted from 0; got [4]": Scale("k", 1, (1,), factor=0.0, heads=(4,), stack="audio_encoder"),
    "This model has no vision_encoder": Scale("resid_post", 0, (1,), factor=0.0, stack="vision_encoder"),
    "A site is one of resid_pre,": Patch("resid_post", 1, (3,), Source(CLEAN, site="attn")),
    "layers in the decoder, counted from 0; got [7]": Patch("resid_post", 1, (3,), Source(CLEAN, layer=7)),
    "z cannot become pattern": Patch("pattern", 1, (3,), Source(CLEAN, site="z")),
    "pattern cannot become z": Patch("z", 1, (3,), Source(CLEAN, site="pattern")),
    "no key to look at": Knockout((1,), (5,), range(6)),
    "no key to look at.": (Knockout((1,), (5,), (0, 1, 2), heads=(2,)), Knockout((1,), (5,), (3, 4, 5), heads=(1, 2))),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("says", REFUSED)
def test_what_a_branch_cannot_be_is_said_in_one_line(says, engine):
    change = REFUSED[says]
    with pytest.raises(InputError) as caught:
        run_branches(model_of("grouped"), branches(BASE, change), engine=engine)
    assert says.rstrip() in f"{caught.value} ".replace("  ", " ")
    assert "\n" not in str(caught.value)


@BOTH
def test_a_window_leaves_no_key_where_its_few_keys_are_knocked_out(engine):
    model = model_of("windows")
    with pytest.raises(InputError, match="no key to look at"):
        run_branches(model, branches(BASE, Knockout((1,), (-1,), range(13, 18))), engine=engine)
    outcome = run_branches(model, branches(BASE, Knockout((1,), (-1,), range(14, 18))), engine=engine)
    assert outcome.values.isfinite().all()


@BOTH
@pytest.mark.parametrize(
    ("error", "says", "run", "change"),
    [
        (InputError, "positions of adapter.hook_in.*got .100.", AUDIO, Scale("adapter_in", 0, (100,), factor=0.0)),
        (InputError, "encoder.*got .100.", AUDIO, Scale("resid_post", 1, (100,), factor=0.0, stack="audio_encoder")),
        (InputError, "Position 100 is asked of", AUDIO, Patch("adapter_out", 0, (3,), Source(AUDIO, positions=(100,)))),
        (InputError, "does not fit", AUDIO, Patch("adapter_out", 0, (3,), noise(1, 32))),
        (InputError, "key to look at", PADDED, Knockout((1,), (-1,), range(PADDED.n_pos))),
    ],
)  # fmt: skip
def test_what_only_some_runs_have(engine, error, says, run, change):
    with pytest.raises(error, match=says):
        run_branches(model_of("grouped"), branches(run, change), engine=engine)


def test_a_change_before_the_decoder_needs_audio_to_hear():
    change = Scale("adapter_out", 0, (1,), factor=0.0)
    with pytest.raises(InputError, match="needs a run of `Inputs`"):
        run_branches(model_of("grouped"), branches(BASE, change), engine="sweep")
    with pytest.raises(InputError, match="needs a run of `Inputs`"):
        run_branches(model_of("grouped"), branches(BASE, change), engine="hooks")


def test_a_run_is_of_one_prompt():
    with pytest.raises(InputError, match="these inputs hold 2"):
        Run(Embedded(noise(2, 5, 64), torch.ones(2, 5, dtype=torch.bool)))
    with pytest.raises(InputError, match="The prompt has 2 positions, and the inputs 18"):
        Run(BASE.inputs, Prompt((1, 2), (Position("a", "template"),) * 2))
    run = Run(BASE.inputs, Prompt((1,) * 18, (Position("a", "template"),) * 17 + (Position("b", "last"),)))
    assert run.indices("last") == (17,)
    with pytest.raises(InputError, match="No position of this prompt is 'object'; its regions are last, template"):
        run.indices("object")


@pytest.mark.parametrize(
    ("says", "make"),
    [
        ("at least one", lambda: Scale("z", 1, (), factor=0.0)),
        ("at least one", lambda: Scale("z", 1, (3, 3), factor=0.0)),
        ("heads are of q k v z pattern", lambda: Scale("resid_post", 1, (3,), factor=0.0, heads=(1,))),
        ("neurons are of post", lambda: Scale("mlp_out", 1, (3,), factor=0.0, neurons=(1,))),
        ("keys are of pattern", lambda: Scale("z", 1, (3,), factor=0.0, keys=(1,))),
        ("2 positions need as many rows", lambda: Patch("resid_post", 1, (3, 4), noise(1, 64))),
        ("2 positions need as many rows", lambda: Patch("resid_post", 1, (3, 4), noise(64))),
        ("read is at some positions, .* got ..", lambda: Score(torch.sum, ())),
    ],
)
def test_a_change_that_makes_no_sense_is_refused_at_once(says, make):
    with pytest.raises(InputError, match=says):
        make()


SLIPS = {  # as they are met where nobody checks types: the tests themselves do
    "positions are whole numbers, in a tuple or a range; got 5.": "Scale('resid_post', 1, 5, factor=0.0)",
    "got slice(None, 3, None)": "Scale('resid_post', 1, slice(3), factor=0.0)",
    "got (1.5,)": "Scale('resid_post', 1, (1.5,), factor=0.0)",
    "heads are whole numbers, in a tuple or a range; got 2.": "Scale('z', 1, (3,), factor=0.0, heads=2)",
    "range; got 'audio'": "Scale('pattern', 1, (3,), factor=0.0, keys='audio')",
    "layers are whole numbers, in a tuple or a range; got 3.": "Knockout(3, (-1,), (3,))",
    "A change of no queries changes nothing": "Knockout((3,), (), (3,))",
    "A layer is a whole number; got '2'.": "Scale('z', '2', (3,), factor=0.0)",
    "or states of a run: Source(run); got a Run.": "Patch('resid_post', 1, (3,), RUN)",
    "a tuple of changes, even of one; got Scale(": "Branch(RUN, Scale('z', 1, (3,), factor=0.0))",
    "a tuple of changes, even of one; got ('blocks": "Branch(RUN, ('blocks.0.hook_resid_post', print))",
    "a tuple of changes, even of one; got (3,)": "Branch(RUN, (3,))",
    "A branch is of a Run: Run(inputs, prompt); got a Embedded.": "Branch(RUN.inputs)",
    "give a list of branches, one or more": "Plan(None, Branch(RUN))",
    "What is read is said as LogProbs(tokens=...) and its like": "Plan(None, [Branch(RUN)], LogProbs)",
    "read is at some positions, each a whole number; got 'late'.": "LogProbs('late')",
    "positions are whole numbers, in a tuple or a range; got 7.": "Resid(1, 7)",
    "tokens are whole numbers, in a tuple or a range; got 7.": "Logits(tokens=7)",
}
SLIP = """
import torch
from lalm_lens import *
RUN = Run(Embedded(torch.zeros(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)))
for slip in {slips}:
    try:
        eval(slip)
    except LensError as error:
        print(error)
"""


def test_ordinary_slips_are_answered_with_what_is_wanted():
    script = SLIP.format(slips=list(SLIPS.values()))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for says, line in zip(SLIPS, done.stdout.splitlines(), strict=True):
        assert says in line


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("blocks.2", "forward"),
        ("blocks.1", "forward_pre"),
        ("blocks.2.mlp", "forward"),
        ("blocks.1.hook_resid_mid", "forward"),
    ],
)
def test_hooks_of_torchs_own_are_hooks_too(runs, where, kind):
    base, clean = runs
    model, its = from_hf(tiny_hf(7)), branches(base, Patch("resid_post", 0, (-1,), Source(clean)))
    plain = run_branches(model, its)
    change = {
        "forward": lambda module, args, out: 0.5 * out,
        "forward_pre": lambda module, args: (0.5 * args[0], *args[1:]),
    }
    handle = getattr(model.get_submodule(where), f"register_{kind}_hook")(change[kind])
    with pytest.raises(HookError, match=f"A hook on {where} would be part of every run"):
        Plan(model, its, engine="sweep")
    outcome = run_branches(model, its)
    assert (outcome.engine, plain.engine) == ("hooks", "sweep")
    assert (outcome.values - plain.values).abs().max() > 1e-3
    handle.remove()
    assert run_branches(model, its).engine == "sweep"


@BOTH
def test_a_score_has_a_row_for_each_branch(runs, engine):
    base, clean = runs
    its = branches(base, *(Patch("resid_post", layer, (-1,), Source(clean)) for layer in range(2)))
    for wrong in (lambda logits: logits[0, -1, [5, 9]], lambda logits: logits.sum(), lambda logits: 3.0):
        with pytest.raises(InputError, match="the logits of 1 branches"):
            run_branches(model_of("grouped"), its, Score(wrong), engine=engine)


def test_a_knockout_of_padding_alone_changes_nothing():
    padded = heard((0.5, 0.25), row=1)
    its = branches(padded, Knockout((1,), (-1,), (0, 2)), Knockout((0,), (1,), (0, padded.n_pad + 1)))
    assert assert_same(model_of("grouped"), its).n_skipped == 2


def test_padding_can_be_read_by_hooks_alone():
    model, padded = model_of("grouped"), heard((0.5, 0.25), row=1)
    its = branches(padded, Scale("resid_post", 1, (-1,), factor=0.5))
    readout = Logits((-1, padded.n_pad - 1))
    assert run_branches(model, its, readout).engine == "hooks"
    with pytest.raises(InputError, match=f"some are padding, the first {padded.n_pad}"):
        Plan(model, its, readout, engine="sweep")


@BOTH
def test_a_query_without_keys_is_named_with_its_padding(engine):
    padded = heard((0.5, 0.25), row=1)
    query = padded.n_pad + 2
    with pytest.raises(InputError, match=rf"{query}\b.* no key"):
        run_branches(model_of("grouped"), branches(padded, Knockout((1,), (query,), range(query + 1))), engine=engine)


@BOTH
def test_what_a_plan_cannot_be(engine):
    model, its = model_of("grouped"), branches(BASE, Scale("z", 1, (3,), factor=0.0))
    for says, kwargs in {
        "Nothing to run": {"branches": []},
        "A token budget is a whole number from 1 on; got 0": {"token_budget": 0},
        "The state after block 4 is read; there are 4": {"readout": Resid(4)},
        "The state after block -5": {"readout": Resid(-5)},
        "from 0 to 17, or from the end from -1; got [(]18,": {"readout": Logits((18,))},
        "from 0 to 17, or from the end from -1; got [(]0, -19": {"readout": Resid(1, (0, -19))},
        "different positions; got [(]-1, 17": {"readout": Score(torch.sum, (-1, 17))},
        "There are 260 tokens, counted from 0; got .260.": {"readout": LogProbs(tokens=(3, 260))},
    }.items():
        with pytest.raises(InputError, match=says):
            run_branches(model, **{"branches": its, "engine": engine} | kwargs)


@BOTH
def test_broken_weights_are_found_before_anything_runs(engine):
    model = from_hf(tiny_hf(7))
    with torch.no_grad():
        model.blocks[2].mlp.out_proj.weight[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"not finite in torch.float32. The weights of this checkpoint are broken"):
        Plan(model, branches(BASE, Scale("z", 1, (3,), factor=0.0)), engine=engine)


# --- any branches at all -------------------------------------------------------------------------------------

SEED = int(os.environ.get("ENGINE_SEED", "0"))
N_EXAMPLES = [60, pytest.param(1000, marks=pytest.mark.stress)]
POOL = [model_of(name) for name in MODELS]
LAYER, HEADS = st.integers(0, N_LAYERS - 1), st.sets(st.integers(0, 3), min_size=1).map(tuple)
RUNS = {n_pos: (embedded(1, n_pos), embedded(2, n_pos), embedded(3, 19)) for n_pos in (12, 15, 20)}
ROW = {"padded": (PADDED, heard((0.5, 0.25), row=1, seed=5), heard((0.5,), seed=3))}


def positions(n_pos: int, n_at: int):
    return st.lists(st.integers(0, n_pos - 1), min_size=n_at, max_size=n_at, unique=True).map(tuple)


@st.composite
def edits(draw, model, run, clean, longer):
    site, layer = draw(st.sampled_from(SITES)), draw(LAYER)
    n_at = draw(st.integers(1, 4))
    at = tuple(pos - run.n_pos if draw(st.booleans()) else pos for pos in draw(positions(run.n_pos, n_at)))
    part = {}
    if site in BY_HEAD and draw(st.booleans()):
        heads = draw(HEADS)
        part = {"heads": tuple({head % unit(model, site, 1)[0] for head in heads})}
    elif site == "post" and draw(st.booleans()):
        part = {"neurons": (3, 90, 17)}
    kind = draw(st.sampled_from([Patch, Patch, Add, Scale, Recompute]))
    if kind is Scale:
        return Scale(site, layer, at, factor=draw(st.sampled_from([0.0, 0.5, -1.0])), **part)
    if kind is Recompute:
        return Recompute(site, layer, at, **part)
    factor = {} if kind is Patch else {"factor": draw(st.sampled_from([0.0, 1.0, -0.5]))}
    sources = ["clean", "clean", "elsewhere", "noise", "base"]
    if site == "pattern":
        sources = ["clean", "noise", "base"]
    elif site not in BY_HEAD and site != "post" and layer:
        sources.append("own")
    source = draw(st.sampled_from(sources))
    if source == "noise":
        part, value = {}, state(model, site, n_at, run.n_pos, seed=draw(st.integers(0, 9)))
        if site == "pattern":
            value[..., : run.n_pad] = 0
    elif source == "elsewhere":
        value = Source(longer, layer=draw(LAYER), positions=draw(positions(longer.n_pos, n_at)))
    elif source == "own":
        earlier, where = draw(st.integers(0, layer - 1)), draw(positions(run.n_pos - run.n_pad, n_at))
        where = tuple(pos + run.n_pad for pos in where)
        value = Source(OWN, layer=earlier, positions=where, site=draw(st.sampled_from(RESID)))
    else:
        value = Source(clean if source == "clean" else run)
    return kind(site, layer, at, value, **factor, **part)


@st.composite
def on_scores(draw, run):
    """A query keeps at least itself."""
    queries = draw(st.lists(st.integers(run.n_pad, run.n_pos - 1), min_size=1, max_size=4, unique=True))
    keys = draw(st.sets(st.integers(0, run.n_pos - 1).filter(lambda key: key not in queries), min_size=1))
    layers = tuple(sorted(draw(st.sets(LAYER, min_size=1))))
    where = layers, tuple(queries), tuple(keys), draw(st.none() | HEADS)
    return ScaleAttention(*where, factor=draw(st.floats(0.1, 9))) if draw(st.booleans()) else Knockout(*where)


@st.composite
def plans(draw):
    model, its = draw(st.sampled_from(POOL)), []
    for _ in range(draw(st.integers(1, 2))):  # runs
        run, clean, longer = {**RUNS, **ROW}[draw(st.sampled_from([*RUNS, *ROW]))]
        change = edits(model, run, clean, longer) | edits(model, run, clean, longer) | on_scores(run)
        n_branches = draw(st.integers(1, 4))
        its += [Branch(run, tuple(draw(st.lists(change, min_size=1, max_size=4)))) for _ in range(n_branches)]
    at = draw(st.lists(st.integers(-12, -1), min_size=1, max_size=2, unique=True).map(tuple))
    readout = draw(
        st.sampled_from([Logits(at), LogProbs(at), Resid(draw(LAYER), at), Score(lambda logits: logits, at)])
    )
    return model, its, readout, draw(st.none() | st.integers(1, 120))


@pytest.mark.numbers
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # type checks of tests do
@pytest.mark.parametrize("n_examples", N_EXAMPLES)
def test_any_branches_on_any_model_with_any_budget(n_examples):
    print(f"ENGINE_SEED={SEED}")

    @seed(SEED)
    @settings(max_examples=n_examples, deadline=None, print_blob=True, database=None)
    @given(plans())
    def check(plan):
        model, its, readout, token_budget = plan
        assert_same(model, its, readout, token_budget)

    check()
