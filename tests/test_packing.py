import pytest
import torch

from sdq_hf import packing
from sdq_hf.packing import pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_packing_is_the_bit_string(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    packed = pack(codes, bits)
    stream = "".join(f"{code:0{bits}b}"[::-1] for code in codes.tolist())
    stream += "0" * (-len(stream) % 8)
    expected = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    assert packed.tolist() == expected
    assert packed.numel() == packed_size(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_in_parts_gives_every_code_its_place(bits, monkeypatch):
    monkeypatch.setattr(packing, "_PART", 64)
    codes = torch.randint(2**bits, (1000,), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 1000), codes)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit in 2 bits"):
        pack(torch.tensor([4, 0]), 2)
    with pytest.raises(ValueError, match=r"-1\.\.3 do not fit in 2 bits"):
        pack(torch.tensor([3, -1]), 2)
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_no_code_has_are_refused(bits: int):
    with pytest.raises(ValueError, match=f"at 1 to 8 bits, got {bits}"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)
