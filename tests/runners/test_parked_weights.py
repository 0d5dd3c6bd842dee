"""Weights put away and taken back: from their files, from host memory, and what cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.runners.host_slabs import HostSlabs, is_dense
from engine.runners.parked_weights import ParkedWeights, WeightsChangedError


class Net(nn.Module):
    """Layers of equal shape, a table whose weights two layers share, and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 50, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("places", torch.arange(8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids) + self.places
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.out(hidden)


IDS = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def net() -> Iterator[Net]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield Net().eval()


def stored(net: Net, folder: Path, *, dtype: torch.dtype = torch.float32, prefix: str = "bert.") -> Path:
    """The network in two files, under other names than its own."""
    (folder / "part").mkdir()
    weights = {prefix + name: tensor.detach().to(dtype) for name, tensor in net.state_dict().items()}
    del weights[prefix + "out.weight"]
    first = {name: weights.pop(name) for name in list(weights)[:4]}
    save_file(first, folder / "one.safetensors")
    save_file(weights, folder / "part" / "two.safetensors")
    return folder / "one.safetensors"


def sizes(net: Net) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in net.named_parameters()}


def mapped(folder: Path) -> int:
    """How many mappings of the folder's files this process has."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_weights_go_and_come_back_from_their_files(net: Net, tmp_path: Path) -> None:
    stored(net, tmp_path)
    before = net(IDS)
    parked = ParkedWeights([net], tmp_path)
    for _ in range(3):
        parked.put_away()
        parked.put_away()
        assert set(sizes(net).values()) == {0} and net.places.tolist() == list(range(8))
        assert mapped(tmp_path) == 0
        parked.take_back()
        parked.take_back()
        assert torch.equal(net(IDS), before)
        assert net.out.weight is net.table.weight
        assert net.out.weight.data_ptr() == net.table.weight.data_ptr()
        assert mapped(tmp_path) >= 2


def test_files_of_another_type_are_converted_again(net: Net, tmp_path: Path) -> None:
    net.half().float()
    stored(net, tmp_path, dtype=torch.float16)
    before = net(IDS)
    parked = ParkedWeights([net], tmp_path)
    parked.put_away()
    assert set(sizes(net).values()) == {0}
    parked.take_back()
    assert torch.equal(net(IDS), before) and net.table.weight.dtype == torch.float32


def test_what_no_file_holds_stays(net: Net, tmp_path: Path) -> None:
    stored(net, tmp_path)
    net.layers[2].weight.data = net.layers[2].weight * 1.0001
    before = net(IDS)
    parked = ParkedWeights([net], tmp_path)
    parked.put_away()
    assert [name for name, size in sizes(net).items() if size] == ["layers.2.weight"]
    parked.take_back()
    assert torch.equal(net(IDS), before)


def test_files_that_changed_while_it_slept_are_not_taken(net: Net, tmp_path: Path) -> None:
    file = stored(net, tmp_path)
    parked = ParkedWeights([net], tmp_path)
    parked.put_away()
    new = file.with_suffix(".new")
    new.write_bytes(file.read_bytes())
    new.replace(file)
    with pytest.raises(WeightsChangedError, match=r"one.safetensors has changed since the model was loaded"):
        parked.take_back()
    file.unlink()
    with pytest.raises(WeightsChangedError):
        parked.take_back()


def test_a_gpus_weights_are_copied_to_the_host_once(net: Net, tmp_path: Path) -> None:
    net.layers[1].weight.data = net.layers[1].weight.T.contiguous().T  # dense, in another order
    before = net(IDS)
    made: list[int] = []

    def allocate(size: int) -> Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    slabs = HostSlabs(allocate, slab_bytes=256)
    parked = ParkedWeights([net], tmp_path, slabs=slabs, on_gpu=lambda _: True)
    for _ in range(3):
        parked.put_away()
        assert set(sizes(net).values()) == {0} and net.places.numel() == 0
        parked.take_back()
        assert torch.equal(net(IDS), before)
        assert net.layers[1].weight.stride() == (1, 8) and net.out.weight is net.table.weight
    need = sum(tensor.nbytes for tensor in [*net.parameters(), net.places])
    assert sum(made) == -(-need // 256) * 256


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool]),
            st.lists(st.integers(0, 7), max_size=4),
            st.permutations(range(4)),
        ),
        max_size=8,
    ),
    st.sampled_from([1, 2, 16, 64, 4096]),
)
def test_slabs_give_back_every_tensor_bit_for_bit(
    kinds: list[tuple[torch.dtype, list[int], list[int]]], slab_bytes: int
) -> None:
    tensors = []
    for dtype, shape, order in kinds:
        tensor = torch.randint(0, 2, shape).to(dtype).permute([i for i in order if i < len(shape)])
        if is_dense(tensor):
            tensors.append(tensor)
    slabs = HostSlabs(lambda size: torch.empty(size, dtype=torch.uint8), slab_bytes)
    places = [slabs.copy(tensor) for tensor in tensors]
    for tensor, place in zip(tensors, places, strict=True):
        back = slabs.restore(place)
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype
        assert back.stride() == tensor.stride()


def test_what_is_dense() -> None:
    whole = torch.zeros(4, 6)
    assert is_dense(whole) and is_dense(whole.T) and is_dense(whole[1:3])
    assert not is_dense(whole[:, 1:3]) and not is_dense(whole[:1].expand(4, 6))
