"""torch.compile of the forward pass: the same logits and gradients, few graphs.

Most use backends without a code generator, which are quick: what is tried is that the pass can be captured. One, of a
single block, runs what torch's own kernel generator makes of it, where there is a C++ compiler. Laying out a call and
the fusion layers run as they are between the graphs.
"""

import shutil

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from casa import FusionConfig, adapt
from casa.testing import TinySample, tiny_casa_over, tiny_encoder, tiny_processor, tiny_text_model

SAMPLE = TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3), (5, 1, 2)))
OTHER = TinySample((5, 9, 17, 4, 33, 8, 21), ((0, 1, 1), (3, 2, 2)), seed=8)


def floats(sample):
    return {k: v.float() if v.is_floating_point() else v for k, v in sample.inputs().items()}


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(blocks, **fusion):
    """A model of so many blocks: every graph costs a second."""
    text = tiny_text_model(dtype=torch.float32, num_hidden_layers=blocks)
    return adapt(text, FusionConfig(**fusion), vision=tiny_encoder(dtype=torch.float32)).eval()


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
@torch.no_grad()
def test_logits_are_the_same_and_graphs_are_few(kind):
    model = tiny_casa_over(kind).float()
    compiled = torch.compile(model, backend="aot_eager")
    ids = {"input_ids": torch.tensor([SAMPLE.ids])}
    near(compiled(**ids).logits, model(**ids).logits)
    # the whole stack is one graph
    assert counters["stats"]["unique_graphs"] <= 3
    near(compiled(**floats(SAMPLE)).logits, model(**floats(SAMPLE)).logits)
    made = counters["stats"]["unique_graphs"]
    # at each of three fused blocks the graph ends
    assert made <= 14
    near(compiled(**floats(OTHER)).logits, model(**floats(OTHER)).logits)
    assert counters["stats"]["unique_graphs"] == made, "other images need no other graphs"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="kernels for a CPU are C++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler, in places that vary by version
@torch.no_grad()
def test_generated_kernels_give_the_same():
    model = small(1)
    with torch._inductor.config.patch(compile_threads=1):  # processes of its own take longer to start than this
        near(torch.compile(model)(**floats(SAMPLE), use_cache=False).logits, model(**floats(SAMPLE)).logits)
    assert counters["inductor"], "nothing was generated"


@pytest.mark.slow
@torch.no_grad()
def test_insertion_compiles_too():
    model = small(1, method="insertion")
    compiled = torch.compile(model, backend="aot_eager")
    near(compiled(**floats(SAMPLE), use_cache=False).logits, model(**floats(SAMPLE), use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, of hidden states it traces
def test_gradients_are_the_same():
    model = small(2)
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for run in (model, compiled):
        model.zero_grad()
        run(**floats(SAMPLE), labels=floats(SAMPLE)["input_ids"], use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_goes_on_in_a_compiled_model():
    model = small(1)
    compiled = torch.compile(model, backend="eager")
    first, second = SAMPLE.calls([4])
    found, caches = [], []
    for run in (model, compiled):
        cache = run(
            **{k: v.float() if v.is_floating_point() else v for k, v in first.items()}, use_cache=True
        ).past_key_values
        later = {k: v.float() if v.is_floating_point() else v for k, v in second.items()}
        outputs = [run(**later, past_key_values=cache).logits]
        outputs.append(run(input_ids=torch.tensor([[11]]), past_key_values=cache).logits)
        found.append(torch.cat(outputs, dim=1))
        caches.append(cache.num_text)
    near(*found)
    assert caches == [8, 8]


@pytest.mark.slow
@torch.no_grad()
def test_what_a_processor_makes_can_be_given():
    model = small(1)
    compiled = torch.compile(model, backend="eager")
    pictures = [Image.new("RGB", (56, 28), (shade, 10, 10)) for shade in (20, 200)]
    inputs = tiny_processor()(images=pictures, text=["a<image>bc", "<image>d"])
    near(compiled(**inputs).logits, model(**inputs).logits)
