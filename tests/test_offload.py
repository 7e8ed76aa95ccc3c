"""A model spread over devices and disk computes what the same model computes in one place."""

import copy
import gc
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from reference import chirps, hf_batch, tiny_hf
from safetensors import SafetensorError
from test_memory import checkpoint_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from conversions.qwen2_audio import QWEN2_AUDIO
from lalm_lens import info, offload, placement
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.datasets import read_folder
from lalm_lens.engine import passing
from lalm_lens.engine.base import Base
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.passing import go_through
from lalm_lens.engine.plan import Plan, run_branches
from lalm_lens.errors import InputError, LensError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.fingerprints import weights_fingerprint
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import Add, Knockout, Patch, Scale
from lalm_lens.loading import from_hf, from_pretrained, skeleton
from lalm_lens.model import HookedLALM
from lalm_lens.offload import Store, attach, held
from lalm_lens.placement import Placement
from lalm_lens.readouts import Logits
from lalm_lens.runs import OWN, Run, Source
from lalm_lens.transformer import HookedTransformer
from lalm_lens.weights import assign

pytestmark = pytest.mark.numbers

SPREADS = {
    "a block on disk": {"device_map": {"blocks.2": "disk", "": "cpu"}},
    "the decoder on disk": {"device_map": {"": "disk", "audio_encoder": "cpu", "adapter": "cpu"}},
    "everything on disk": {"device_map": {"": "disk"}},
    "half a block on disk": {"device_map": {"blocks.1.mlp": "disk", "audio_encoder.W_pos": "disk", "": "cpu"}},
    "automatic": {"device_map": "auto", "max_memory": {"cpu": "330KB"}},
    "in order": {"device_map": "sequential", "max_memory": {"cpu": "330KB"}},
    "automatic, all on disk": {"device_map": "auto", "max_memory": {"cpu": 1}},
}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
spreads = pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_hf().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.from_hf(hf_batch(chirps([1.2, 0.6])))


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """What is put into the system's temporary folder lies here."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Every weight that is fetched from where it is kept."""
    names, fetch = [], Store.__getitem__
    monkeypatch.setattr(Store, "__getitem__", lambda self, name: names.append(name) or fetch(self, name))
    return names


@spreads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_every_state_are_the_same(checkpoint, inputs, spread, dtype):
    plain, ours = from_pretrained(checkpoint, dtype=dtype), from_pretrained(checkpoint, dtype=dtype, **spread)
    assert "disk" in ours.placement.lies.values()
    with torch.no_grad():
        (logits, cache), (expected, of_plain) = ours.run_with_cache(inputs), plain.run_with_cache(inputs)
    assert_close(logits, expected)
    assert set(cache) == set(of_plain)
    for name, state in of_plain.items():
        assert_close(cache[name], state)
    assert (ours.cfg.device, ours.cfg.dtype, ours.device) == ("cpu", dtype, torch.device("cpu"))


@spreads
def test_offloaded_weights_are_read_once_a_forward_and_are_gone_after_it(checkpoint, inputs, reads, spread):
    model = from_pretrained(checkpoint, **spread)
    away = {name for name, place in model.placement.lies.items() if place == "disk"}

    def offloaded() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.is_meta}

    assert offloaded() == away
    with torch.no_grad():
        model(inputs)
    assert offloaded() == away
    assert sorted(reads) == sorted(away)


def test_a_run_that_fails_leaves_no_weights_behind(checkpoint, inputs):
    model = from_pretrained(checkpoint, device_map={"": "disk"})

    def fail(state, hook):
        raise ZeroDivisionError

    for name in ("blocks.1.ln1.hook_scale", "audio_encoder.hook_embed"):  # inside a module whose weights are here
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model.run_with_hooks(inputs, fwd_hooks=[(name, fail)])
        assert all(parameter.is_meta for parameter in model.parameters())


def test_a_fingerprint_is_that_of_the_weights_wherever_they_lie(checkpoint):
    plain, ours = from_pretrained(checkpoint), from_pretrained(checkpoint, device_map={"": "disk"})
    assert weights_fingerprint(ours) == weights_fingerprint(plain)
    assert all(parameter.is_meta for parameter in ours.parameters())


def test_a_hook_may_run_the_model_itself(checkpoint, inputs):
    plain, ours = from_pretrained(checkpoint), from_pretrained(checkpoint, device_map={"": "disk"})
    inner = []

    def run(state, hook):
        if not inner:
            inner.append(None)
            inner.append(ours(inputs))

    with torch.no_grad():
        expected, out = plain(inputs), ours.run_with_hooks(inputs, fwd_hooks=[("blocks.1.ln1.hook_scale", run)])
    assert_close(out, expected)
    assert_close(inner[1], expected)
    assert all(parameter.is_meta for parameter in ours.parameters())


def test_held_weights_are_read_once_for_any_number_of_uses(checkpoint, inputs, reads):
    model = from_pretrained(checkpoint, device_map={"blocks": "disk", "": "cpu"})
    with torch.no_grad(), held(model.blocks[1]):
        assert model.blocks[1].attn.W_Q.shape == (4, 64, 16)
        assert len(reads) == 12
        for _ in range(3):
            model(inputs)
    assert sum(name.startswith("blocks.1.") for name in reads) == 12
    assert len(reads) == 12 + 3 * 3 * 12
    assert all(parameter.is_meta for parameter in model.blocks.parameters())


def test_every_way_into_the_model_does_the_same(checkpoint, inputs):
    plain, ours = from_pretrained(checkpoint), from_pretrained(checkpoint, device_map={"": "disk"})
    patch = [Patch("resid_post", 2, (7, 9), torch.randn(2, 64)).hook()]
    tokens = torch.randint(10, 200, (2, 5))
    ways = {
        "patched": lambda model: model.run_with_hooks(inputs, fwd_hooks=patch),
        "embedded": lambda model: model(model.embed_inputs(inputs)),
        "bound": lambda model: model.bind(inputs)(inputs.tokens),
        "words alone": lambda model: model(tokens),
        "resumed": lambda model: model(model(tokens, stop_at_layer=2), start_at_layer=2),
        "generated": lambda model: model.generate(inputs, 4).log_probs,
        "a copy": lambda model: copy.deepcopy(model)(inputs),
    }
    for name, run in ways.items():
        with torch.no_grad():
            assert_close(run(ours), run(plain), msg=lambda text, name=name: f"{name}: {text}")


def test_states_have_the_same_gradients(checkpoint, inputs):
    gradients = []
    for spread in ({}, {"device_map": {"": "disk"}}):
        model, seen = from_pretrained(checkpoint, **spread), {}
        hooks = [
            (name, lambda gradient, hook, seen=seen: seen.update({hook.name: gradient}))
            for name in ("blocks.1.hook_resid_post", "blocks.2.attn.hook_z", "audio_encoder.hook_embed")
        ]
        with model.hooks(bwd_hooks=hooks):
            model(inputs)[:, -1].logsumexp(-1).sum().backward()
        gradients.append(seen)
    assert len(gradients[0]) == 3
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("switch", ["attn_result", "split_qkv_input", "hook_mlp_in"])
def test_hook_points_that_are_switched_on_fire_on_offloaded_blocks(checkpoint, inputs, reads, switch):
    caches = []
    for spread in ({}, {"device_map": {"blocks": "disk", "": "cpu"}}):
        model = from_pretrained(checkpoint, **spread)
        getattr(model, f"set_use_{switch}")(True)
        with torch.no_grad():
            caches.append(model.run_with_cache(inputs)[1])
    for name, state in caches[0].items():
        assert_close(caches[1][name], state)
    assert len(reads) == len(set(reads)) == 48
    assert all(parameter.is_meta for parameter in model.blocks.parameters())


def test_tied_embeddings_stay_one_weight(checkpoint, reads):
    cfg = replace(from_pretrained(checkpoint).decoder_cfg, tied=True)
    plain, ours, tokens = HookedTransformer(cfg), HookedTransformer(cfg), torch.randint(10, 200, (2, 5))
    ours.placement = Placement.of(ours, {"": "cpu", "embed": "disk"})
    store = Store(ours, ours.placement, torch.float32, None)
    for name, parameter in plain.named_parameters():
        assign(ours, name, store.put(name, parameter.detach()))
    ours.tie()
    attach(ours, ours.placement, store)
    for _ in range(2):
        with torch.no_grad():
            assert_close(ours(tokens), plain(tokens))
        assert ours.unembed.linear.weight is ours.embed.table.weight
        assert ours.embed.table.weight.is_meta
    assert reads == ["embed.table.weight"] * 4  # once for words and once for logits


def test_a_trace_is_the_same(tmp_path, tiny_lalm):
    samples = read_folder(write_clips(tmp_path / "clips", "gender", 2, seed=3))
    ours = from_pretrained(TINY_LALM, device_map={"blocks": "disk", "audio_encoder": "disk", "": "cpu"})
    plain, spread = (causal_trace(model, samples, attribute="gender", progress=False) for model in (tiny_lalm, ours))
    pd.testing.assert_frame_equal(spread.frame, plain.frame)


BRANCHES = [("resid_post", layer, pos) for layer in range(4) for pos in (6, -4, -1)]


def swept(model: HookedLALM, inputs: Inputs, token_budget: int) -> torch.Tensor:
    """Words' states set to those of another position, in every block."""
    run = Run(inputs)
    branches = [
        Branch(run, (Patch(site, layer, (pos,), Source(run, positions=(7,))),)) for site, layer, pos in BRANCHES
    ]
    return run_branches(model, branches, Logits(), engine="sweep", token_budget=token_budget).values


def one_prompt(inputs: Inputs) -> Inputs:
    return Inputs(inputs.tokens[:1], inputs.attention_mask[:1], inputs.mel[:1], inputs.n_frames[:1])


def test_a_sweep_is_the_same_and_reads_each_weight_once_a_batch(checkpoint, inputs, reads):
    plain, ours = from_pretrained(checkpoint), from_pretrained(checkpoint, device_map={"blocks": "disk", "": "cpu"})
    expected = swept(plain, one_prompt(inputs), 10**6)
    reads.clear()
    assert_close(swept(ours, one_prompt(inputs), 10**6), expected)
    by_name = Counter(reads)
    assert by_name["blocks.3.mlp.out_proj.weight"] == 2  # the run itself, and one batch of branches
    assert max(by_name.values()) == 2
    assert_close(swept(ours, one_prompt(inputs), 10), expected)


@pytest.mark.parametrize("name", ["mlp.out_proj.weight", "attn.q_proj.weight", "attn.k_proj.bias", "ln2.w"])
def test_memory_that_runs_out_for_a_weight_leaves_nothing_half_loaded(checkpoint, inputs, monkeypatch, name):
    plain, ours = from_pretrained(checkpoint), from_pretrained(checkpoint, device_map={"blocks": "disk", "": "cpu"})
    expected, load = swept(plain, one_prompt(inputs), 10**6), Store.__getitem__
    seen: Counter = Counter()

    def fails_once(store: Store, key: str) -> torch.Tensor:
        seen[key] += 1
        if key == f"blocks.2.{name}" and seen[key] == 2:
            raise torch.OutOfMemoryError("no room for it")
        return load(store, key)

    monkeypatch.setattr(Store, "__getitem__", fails_once)
    assert_close(swept(ours, one_prompt(inputs), 10**6), expected)
    assert seen[f"blocks.2.{name}"] > 2
    assert_close(swept(ours, one_prompt(inputs), 10**6), expected)


def test_weights_that_are_not_here_are_not_shown(checkpoint):
    model = from_pretrained(checkpoint, device_map={"blocks.2": "disk", "": "cpu"})
    for look in (
        lambda: model.blocks[2].attn.W_Q,
        lambda: model.blocks[2].attn.b_O,
        lambda: setattr(model.blocks[2].mlp, "W_in", torch.zeros(64, 96)),
        lambda: model.W_Q,
    ):
        with pytest.raises(LensError, match="offloaded"):
            look()
    assert model.blocks[1].attn.W_Q.shape == (4, 64, 16)


def test_a_spread_model_is_neither_moved_nor_cast(checkpoint):
    model = from_pretrained(checkpoint, device_map={"blocks.2": "disk", "": "cpu"})
    for move in (model.half, model.float, model.cpu, lambda: model.to("cpu"), lambda: model.to(torch.bfloat16)):
        with pytest.raises(LensError, match=r"device_map \(blocks: 5 on cpu, 1 on disk\), so it can be neither"):
            move()
    model.train().eval()


def test_a_model_says_how_it_is_spread(checkpoint, monkeypatch):
    maps = {"blocks: 5 on cpu, 1 on disk": {"blocks.2": "disk", "": "cpu"}, "blocks: 6 on cpu": "auto"}
    for says, device_map in maps.items():
        assert repr(from_pretrained(checkpoint, device_map=device_map)).endswith(f"torch.float32, cpu; {says})")
    assert "blocks" not in repr(from_pretrained(checkpoint)).partition("torch.float32")[2]
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 400_000}))
    if not torch.cuda.is_available():
        described = repr(info.info(checkpoint))
        assert 'device_map="auto" here: float32 blocks: ' in described
        assert " on disk, bfloat16 blocks: " in described


@pytest.mark.parametrize(
    ("says", "spread"),
    {
        r"'blocks\.9', which is no part of this model. Name its stages \(embed, blocks": {
            "device_map": {"blocks.9": 0}
        },
        r"says nothing of 12 of 90 parameters, e\.g\. blocks\.3": {
            "device_map": dict.fromkeys(
                "embed blocks.0 blocks.1 blocks.2 ln_final unembed audio_encoder adapter".split(), "cpu"
            )
        },
        "says nothing of 90 of 90": {"device_map": {}},
        "device 'abacus' cannot be used": {"device_map": {"": "abacus"}},
        "device '77' cannot be used": {"device_map": {"": 77}},
        "holds shapes and no numbers": {"device_map": {"": "meta"}},
        "device_map is 'magic'. Give auto, balanced": {"device_map": "magic"},
        "contradict": {"device_map": "auto", "device": "cuda"},
        "says itself what lies where": {"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}},
        "max_memory = .* cannot be used: Device abacus": {"device_map": "auto", "max_memory": {"abacus": 1}},
        "max_memory = .* cannot be used": {"device_map": "auto", "max_memory": {"cpu": "much"}},
        "belong to a device_map": {"max_memory": {"cpu": "1GB"}},
        "Nothing can be written to": {"device_map": {"": "disk"}, "offload_folder": __file__},
    }.items(),
)
def test_what_cannot_be_spread_is_refused(checkpoint, monkeypatch, says, spread):
    if spread.get("device") == "cuda":
        monkeypatch.setattr("lalm_lens.loading.usable_device", torch.device)
    with pytest.raises(InputError, match=says) as caught:
        from_pretrained(checkpoint, **spread)
    assert "\n" not in str(caught.value)


def test_a_block_is_not_split_over_gpus(checkpoint, monkeypatch):
    monkeypatch.setattr(placement, "usable_device", torch.device)
    with pytest.raises(InputError, match=r"splits blocks\.1.* over cuda:0 and cuda:1"):
        from_pretrained(checkpoint, device_map={"blocks.1.mlp": "cuda:1", "": "cuda:0"})


def test_a_full_disk_is_refused(checkpoint, monkeypatch, temporary):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 500_000}))
    with pytest.raises(InputError, match=r"0\.0 GB go to disk, and .* Give an offload_folder"):
        from_pretrained(checkpoint, device_map={"": "disk"})
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(offload, "save_file", full)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(InputError, match=r"cannot be written .* No space left on device .*\. Give an offload_folder"):
        from_pretrained(checkpoint, device_map={"": "disk"})
    gc.collect()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("given", [True, False])
def test_offloaded_files_go_with_the_model(checkpoint, inputs, tmp_path, temporary, given):
    folder = tmp_path / "new" / "offload" if given else temporary
    spread = {"device_map": {"": "disk"}, "offload_folder": folder if given else None}
    model = from_pretrained(checkpoint, **spread)
    assert len(list(folder.rglob("*.safetensors"))) == 90
    bound = model.bind(inputs)
    del model
    gc.collect()
    with torch.no_grad():
        bound(inputs.tokens)  # as long as any part of it is in use
    del bound
    gc.collect()
    assert not list(folder.iterdir())


def test_two_models_share_a_folder_and_nothing_else(checkpoint, inputs, tmp_path):
    other = tmp_path / "other"
    tiny_hf(seed=1).save_pretrained(other)
    loaded = [
        from_pretrained(path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
        for path in (checkpoint, other, checkpoint)
    ]
    with torch.no_grad():
        for path, model in zip((checkpoint, other, checkpoint), loaded, strict=True):
            assert_close(model(inputs), from_pretrained(path)(inputs))


class Pretended(Store):
    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.kept[name] = tensor


@contextmanager
def pretended() -> Iterator[HookedLALM]:
    """A model on two accelerators that are not there, where torch refuses an operation on two devices as it does on
    real ones. (Of the devices that this torch was not built for, "lazy" alone may be indexed.)"""
    model = skeleton(tiny_hf().config.to_dict(), QWEN2_AUDIO, "spread")
    places = {"blocks.0": "lazy:0", "blocks.1": "lazy:1", "blocks.2": "cpu", "blocks.3": "disk"}
    places |= {"embed": "lazy:0", "ln_final": "lazy:1", "unembed": "lazy:1", "adapter": "lazy:1"}
    places |= {"audio_encoder": "lazy:0", "audio_encoder.W_pos": "lazy:1", "audio_encoder.conv2": "lazy:1"}
    lies = {name: placement.said_of(name, places) for name, _ in model.named_parameters()}
    model.placement = Placement.from_lies(model, lies)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        store = Pretended(model, model.placement, torch.float32, None)
        for name, parameter in list(model.named_parameters()):
            assign(model, name, store.put(name, torch.empty(parameter.shape)))
        attach(model, model.placement, store)
        model.follow_weights()
        yield model


def test_several_gpus_meet_no_tensor_of_another():
    seen = {}

    def keep(state, hook):
        seen[hook.name] = str(state.device)

    with pretended() as model:
        heard = model.run_with_hooks(torch.empty(1, 5, 64), fwd_hooks=[(lambda name: name.startswith("blocks"), keep)])
        with model.hooks(fwd_hooks=[("audio_encoder.blocks.1.hook_resid_post", keep)]):
            audio = model.adapter(model.audio_encoder(*model.here((torch.empty(1, 16, 200), torch.tensor([120])))))
    assert (model.cfg.device, str(heard.device), str(audio.device)) == ("lazy:0", "lazy:0", "lazy:0")
    assert [seen[f"blocks.{layer}.hook_resid_mid"] for layer in range(4)] == ["lazy:0", "lazy:1", "lazy:0", "lazy:0"]
    assert str(model.placement) == "blocks: 3 on lazy:0, 1 on lazy:1, 1 on cpu, 1 on disk"
    assert [str(p.device) for p in model.blocks[2].ln1.parameters()] == ["meta"]


def test_a_sweep_over_several_gpus_meets_no_tensor_of_another(monkeypatch):
    """What is computed was planned with real numbers; where it is computed, with pretended ones."""
    run, clean = (Run(Embedded(torch.randn(1, 18, 64), torch.ones(1, 18, dtype=torch.bool))) for _ in range(2))
    its = [
        Branch(run, (Patch(site, layer, (5, -1), Source(clean)),))
        for layer in range(4)
        for site in ("resid_pre", "resid_mid", "resid_post", "q", "v", "pattern", "post", "mlp_out")
    ]
    its += [Branch(run, (Knockout((0, 1, 2), (-1,), (3, 4), heads=(1,)),))]
    its += [
        Branch(run, (Scale("z", 0, (7,), factor=0.0), Add("resid_mid", 3, (-1,), Source(OWN, 1, (9,), "resid_mid"))))
    ]
    sweep = Plan(from_hf(tiny_hf()), its, Logits(), engine="sweep").sweep
    where, attended = [], passing.attend

    def attend(q, *rest):
        where.append(str(q.device))
        return attended(q, *rest)

    monkeypatch.setattr(passing, "attend", attend)
    with pretended() as model:
        sweep.model = model
        sweep.bases = {run: moved(base, "lazy:0") for run, base in sweep.bases.items()}
        values = go_through(sweep, sweep.planned)
    assert {str(value.device) for value in values.values()} == {"lazy:0"}
    assert [place for n, place in enumerate(where) if place != where[n - 1] or not n] == ["lazy:0", "lazy:1", "lazy:0"]


def moved(base: Base, device: str) -> Base:
    lists = {name: [state.to(device) for state in getattr(base, name)] for name in ("resid", "k", "v")}
    states = {name: state.to(device) for name, state in base.states.items()}
    return replace(base, **lists, states=states, value=base.value.to(device))


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_with_what_lies_elsewhere(checkpoint, inputs, dtype):
    spread = {"blocks.1": "cpu", "blocks.2": "disk", "audio_encoder.blocks.0": "cpu", "unembed": "disk", "": 0}
    plain = from_pretrained(checkpoint, dtype=dtype, device="cuda")
    ours = from_pretrained(checkpoint, dtype=dtype, device_map=spread)
    with torch.no_grad():
        (logits, cache), (expected, of_plain) = ours.run_with_cache(inputs), plain.run_with_cache(inputs.to("cuda"))
        assert_close(ours.generate(inputs, 3).log_probs, plain.generate(inputs.to("cuda"), 3).log_probs)
        assert_close(ours.bind(inputs)(inputs.tokens), expected)
    assert_close(logits, expected)
    for name, state in of_plain.items():
        assert_close(cache[name], state)
    assert ours.cfg.device == "cuda:0"


LOAD = """
import sys, threading, torch
from pathlib import Path
from lalm_lens.loading import from_pretrained

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

def watch():
    while not stop.wait(0.002):
        peaks.append(anonymous())

torch.set_num_threads(1)
tokens, spread = torch.arange(8)[None], {"device_map": {"blocks": "disk", "": "cpu"}} if sys.argv[2] == "disk" else {}
peaks, stop = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = from_pretrained(sys.argv[1], **spread)
with torch.no_grad():
    for _ in range(2):
        model(tokens)
stop.set()
thread.join()
print(max(*peaks, anonymous()) - peaks[0])
"""


def growth(checkpoint: Path, where: str) -> int:
    """Peak bytes of anonymous memory that loading and two forwards add, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint), where], check=True, text=True, stdout=subprocess.PIPE
    )
    return int(done.stdout)


@pytest.mark.stress
def test_what_is_on_disk_takes_no_memory(tmp_path):
    folder = checkpoint_of(tmp_path, n_layers=2, vocab_size=1000)  # bfloat16 in files, float32 when loaded
    n_bytes = 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert n_bytes > 300e6
    assert growth(folder, "memory") > n_bytes
    assert growth(folder, "disk") < 80e6  # embeddings 12 MB, the largest tensor once in float32 38 MB
