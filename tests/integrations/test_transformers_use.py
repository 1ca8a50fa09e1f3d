"""What people do with a model: train it, adapt it, pack, compile, pipe, save it; all with maps."""

import json
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CompileConfig, PreTrainedTokenizerFast, pipeline

from gqa_kernels import HeadMap
from gqa_kernels.convert import convert
from gqa_kernels.integrations import transformers as integration
from gqa_kernels.integrations.transformers import PagedCache, attention, register
from gqa_kernels.integrations.transformers.versions import installed
from gqa_kernels.testing import assert_close
from tests import tiny_families
from tests.integrations.releases import CACHE, needs_5
from tests.tiny_families import GROUPED
from tests.tiny_models import batch, expanded, split, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture
def model():
    return split(tiny(), num_kv_heads=4)


def states(model, given):
    """Logits, or the last hidden state."""
    result = model(**given)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


class TestGradients:
    @pytest.mark.parametrize("padded", [True, False])
    @pytest.mark.parametrize("family", sorted({*tiny_families.FAMILIES} - {*GROUPED, "llama"}))
    def test_families_with_expanded_keys_and_values(self, family, padded):
        """Of the input embeddings, or of the image; through transformers' eager attention."""
        if family == "vit" and padded:
            pytest.skip("images have no padding")
        parent = tiny_families.tiny(family)
        child = convert(parent, tiny_families.maps_for(parent))
        child.set_attn_implementation("asym_gqa")
        grads = []
        for model in (child, tiny_families.stock(child, parent)):
            given = tiny_families.inputs(family)
            if not padded and family != "vit":
                given["input_ids"] = batch([9, 9], "right")["input_ids"]
                del given["attention_mask"]
            if family == "vit":
                leaf = given["pixel_values"].requires_grad_()
            else:
                leaf = model.get_input_embeddings().weight
            out = states(model, given)
            if "decoder_input_ids" not in given and "attention_mask" in given:
                out = out[given["attention_mask"].bool()]
            torch.manual_seed(0)
            (out * torch.randn_like(out)).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)

    def test_checkpointing(self, model):
        """Activations made again in the backward pass give the same gradients."""
        inputs = batch([9, 5], "right")
        grads = []
        model.train()
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        assert torch.equal(*grads)

    def test_lora(self, model):
        """Adapters on K and V train, and merge into weights that compute the same."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, config)
        inputs = batch([9, 5], "right")
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        trained = {n for n, p in adapted.named_parameters() if p.grad is not None}
        assert len(trained) == 12  # A and B of three projections in two layers
        assert all("lora" in name for name in trained)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            ours = adapted(**inputs).logits[real]
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits[real], ours, **CLOSE)
            theirs = expanded(merged)(**inputs).logits[real]
        torch.testing.assert_close(ours, theirs, **CLOSE)


class TestGeneration:
    @pytest.mark.parametrize(
        "options", [{"num_beams": 3}, {"do_sample": True}], ids=["beam", "sampling"]
    )
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_beams_and_samples(self, model, cache, options):
        found = []
        for one in (model, expanded(model)):
            torch.manual_seed(0)
            options = {"max_new_tokens": 12, "cache_implementation": cache, **options}
            found.append(one.generate(**batch([7, 3], "left"), **options).tolist())
        assert found[0] == found[1]

    @pytest.mark.parametrize("family", ["llama", pytest.param("gpt_oss", marks=pytest.mark.slow)])
    def test_compiled_with_a_static_cache(self, family):
        """generate() compiles the decode step itself; on a CPU if asked to."""
        model = split(tiny(family), num_kv_heads=4)
        inputs = batch([7, 3], "left")
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
        eager = model.generate(**inputs, **options)
        how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        how._compile_all_devices = True
        compiled = model.generate(**inputs, **options, compile_config=how)
        assert hasattr(model, "_compiled_call")
        assert compiled.tolist() == eager.tolist()

    def test_pipeline(self, model):
        words = {f"w{i}": i for i in range(3, 64)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
        tokenizers = pytest.importorskip("tokenizers")
        words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
        words_only.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words_only, pad_token="<pad>", eos_token="</s>", padding_side="left"
        )
        texts = ["w5 w6 w7 w8", "w9"]
        found = []
        for one in (model, expanded(model)):
            pipe = pipeline("text-generation", model=one, tokenizer=tokenizer, batch_size=2)
            found.append(pipe(texts, max_new_tokens=8, do_sample=False))
        assert found[0] == found[1]
        # "w9" and 8 tokens; transformers 5 joins the first of them to it.
        assert len(found[0][1][0]["generated_text"].split()) == (9 if installed() < (5, 0) else 8)


class TestEvenMaps:
    """The cases of transformers' own test of SDPA against eager attention, for ours: types, padding
    sides, no mask; the last row is padded by two tokens."""

    MODELS = (
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "opt", "gpt2", "gpt_neox",
        "bert", "vit", "t5",
    )  # fmt: skip

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("family", MODELS)
    def test_equals_eager_attention(self, family, dtype):
        of_family = family in tiny_families.CONFIGS and family not in (*GROUPED, "llama")
        window = {"sliding_window": 4} if family == "mistral" else {}
        model = tiny_families.tiny(family) if of_family else tiny(family, **window)
        model.to(dtype)  # weights that every type holds
        sides = (None,) if family == "vit" else ("left", "right", None)
        for side in sides:
            given = tiny_families.inputs(family) if family == "vit" else self.inputs(family, side)
            exact = self.hidden(model, given, "eager", torch.float32)
            ours = self.hidden(model, given, "asym_gqa", dtype)
            if dtype == torch.float32:
                torch.testing.assert_close(ours, exact, **CLOSE)
            else:
                eager = self.hidden(model, given, "eager", dtype)
                assert_close(f"{family}, padding {side}", ours, exact.double(), [eager])

    @staticmethod
    def inputs(family, side):
        given = batch([9, 9, 7], side or "left")
        if side is None:
            given = {"input_ids": batch([9, 9, 9], "left")["input_ids"]}
        if family == "t5":
            given["decoder_input_ids"] = batch([7, 7, 7], "right", seed=3)["input_ids"]
        return given

    @staticmethod
    @torch.no_grad()
    def hidden(model, given, implementation, dtype):
        model.to(dtype).set_attn_implementation(implementation)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        out = model(**given, output_hidden_states=True)
        seen = (out.decoder_hidden_states if "decoder_hidden_states" in out else out.hidden_states)[
            -1
        ]
        model.float()
        if "attention_mask" in given and "decoder_input_ids" not in given:
            return seen[given["attention_mask"].bool()]
        return seen

    def test_sdpa_itself(self):
        """Generated tokens of an even model, and of the same on the pages of a PagedCache."""
        model = tiny()
        inputs = batch([9, 7], "left")
        options = {"max_new_tokens": 12, "do_sample": False}
        theirs = model.generate(**inputs, **options)
        model.set_attn_implementation("asym_gqa")
        paged = model.generate(**inputs, **options, **{CACHE: PagedCache(model.config)})
        assert theirs.tolist() == model.generate(**inputs, **options).tolist() == paged.tolist()

    def test_attention_weights_are_none(self):
        """As SDPA's; the call is otherwise the same."""
        model = tiny()
        model.set_attn_implementation("asym_gqa")
        inputs = batch([9], "left")
        with torch.no_grad():
            out = model(**inputs, output_attentions=True)
            assert torch.equal(out.logits, model(**inputs).logits)
        assert all(weights is None for weights in out.attentions or ())


class TestGuard:
    """A child has ``attn_implementation: asym_gqa`` in its config, which transformers drops of a
    config that it loads."""

    @staticmethod
    def saved_again(child, folder):
        """The config of the child, loaded by transformers and saved without having run."""
        child.save_pretrained(folder / "child")
        loaded = type(child).from_pretrained(folder / "child")
        loaded.save_pretrained(folder / "again")
        return json.loads((folder / "again/config.json").read_text())

    def test_uneven(self, tmp_path):
        child = convert(tiny(num_kv_heads=6), [HeadMap([0, 1, 0, 2, 0, 2])] * 2, merging="mean")
        assert self.saved_again(child, tmp_path)["attn_implementation"] == "asym_gqa"

    def test_even(self, tmp_path):
        child = convert(tiny(num_kv_heads=6), [HeadMap.uniform(6, 3)] * 2, merging="mean")
        assert "attn_implementation" not in self.saved_again(child, tmp_path)

    def test_a_field_of_that_name_that_is_no_map(self):
        """Another library's; building a model must not fail for it."""
        model = tiny(kv_head_map="yes")
        assert not hasattr(model.config, "attn_implementation")


class TestVersion:
    VERSION = "gqa_kernels.integrations.transformers.versions.version"

    @pytest.mark.parametrize("use", [register, lambda: integration.PagedCache])
    def test_too_old(self, monkeypatch, use):
        monkeypatch.setattr(self.VERSION, lambda _: "4.56.2")
        with pytest.raises(ImportError, match=r"needs transformers >= 4\.57 .*: found 4\.56\.2"):
            use()

    def test_newer_than_tested(self, monkeypatch):
        """One warning, whoever asks first."""
        monkeypatch.setattr(self.VERSION, lambda _: "77.7.0")
        with pytest.warns(UserWarning, match=r"with transformers 4\.57 to .*found 77\.7") as seen:
            register()
            register()
        assert len(seen) == 1

    def test_missing(self, monkeypatch):
        def no_package(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(self.VERSION, no_package)
        with pytest.raises(ImportError, match=r">= 4\.57 .*it is not installed"):
            register()

    def test_nothing_is_imported_before_it_is_used(self):
        code = (
            "import gqa_kernels.integrations.transformers, sys; "
            "sys.exit('transformers' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestNoValues:
    """Meta and fake tensors, which have shapes only: tools that plan memory and devices."""

    @needs_5  # transformers 4 makes masks by vmap, which has no meta tensors
    @pytest.mark.parametrize("padded", [True, False])
    @pytest.mark.parametrize("family", tiny_families.FAMILIES)
    def test_meta(self, family, padded):
        if family == "gpt2" and not padded:
            pytest.skip("transformers' own model looks for padding among the tokens")
        child = self.child(family).to("meta")
        given = {n: x.to("meta") for n, x in tiny_families.inputs(family).items()}
        if not padded:
            given.pop("attention_mask", None)
        expected = states(self.child(family), tiny_families.inputs(family))
        found = states(child, given)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.is_meta

    @pytest.mark.parametrize("padded", [True, False])
    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
    def test_fake(self, family, padded):
        inputs = batch([9, 5], "left")
        if not padded:
            del inputs["attention_mask"]
        model = split(tiny(family), num_kv_heads=4)
        expected = model(**inputs, use_cache=False).logits
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = {n: mode.from_tensor(x) for n, x in inputs.items()}
            found = model(**given, use_cache=False).logits
            assert found.shape == expected.shape
            found.sum().backward()

    @staticmethod
    def child(family):
        parent = tiny_families.tiny(family)
        child = convert(parent, tiny_families.maps_for(parent))
        child.set_attn_implementation("asym_gqa")
        return child


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_attention_weights_are_not_to_be_had(family):
    """One warning, however many layers and calls."""
    parent = tiny_families.tiny(family)
    child = convert(parent, tiny_families.maps_for(parent))
    child.set_attn_implementation("asym_gqa")
    attention._warn_no_weights.cache_clear()
    with pytest.warns(UserWarning, match="output_attentions gets no attention weights") as seen:
        for _ in range(2):
            child(**tiny_families.inputs(family), output_attentions=True)
    assert len([w for w in seen if "gets no attention weights" in str(w.message)]) == 1
    attention._warn_no_weights.cache_clear()
    with warnings.catch_warnings():  # none without the request
        warnings.filterwarnings("error", message="output_attentions")
        child(**tiny_families.inputs(family))
