"""Pretraining in several processes: each learns from a batch of its own, and all have the same weights."""

from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import nn

from casa.testing import PATIENCE
from projects.casa_smol import pretraining
from projects.casa_smol.pretraining import Settings, train

SETTINGS = Settings(steps=3, keep_every=3, warm_up=1)


class Standin(nn.Module):
    """A model in which one layer learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.casa_layers = nn.ModuleDict({"2": nn.Linear(3, 2, bias=False)})


def said(model, batch):
    nats = model.casa_layers["2"](batch).square().mean()
    return nats, torch.zeros(()), {"nats": nats.item()}


def learn(process, processes, folder):
    """What one process does."""
    pretraining.said = said
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=processes)

    def draw(step):
        each = [torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * step + number)) for number in range(2)]
        return each[process] if processes > 1 else torch.cat(each)

    model = Standin()
    train(model, draw, SETTINGS, folder / "run")
    torch.save(model.state_dict(), folder / f"{process}.pt")
    if processes > 1:
        dist.destroy_process_group()


def test_two_processes_learn_what_one_learns_of_both_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "said", said)
    (tmp_path / "one").mkdir()
    learn(0, 1, tmp_path / "one")
    alone = torch.load(tmp_path / "one" / "0.pt")
    (tmp_path / "two").mkdir()
    spawn = get_context("spawn")
    workers = [spawn.Process(target=learn, args=(number, 2, tmp_path / "two")) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert worker.exitcode == 0
    first, second = (torch.load(tmp_path / "two" / f"{number}.pt") for number in range(2))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight)
    assert (tmp_path / "two" / "run" / "checkpoint.pt").exists()
