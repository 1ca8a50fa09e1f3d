"""The table of the CUDA kernels' registers and shared memory in csrc/README.md."""

import shutil

import pytest

from .cuda_resources import Kernel, parse, source_key, written

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{decode}' for 'sm_80'
ptxas info    : Function properties for {decode}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 120 registers, used 1 barriers, 768 bytes smem, 936 bytes cmem[0]
ptxas info    : Compiling entry function '{prefill}' for 'sm_90a'
ptxas info    : Function properties for {prefill}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 6 barriers, 1288 bytes cmem[0]
ptxas info    : Compiling entry function '{probe}' for 'sm_90a'
ptxas info    : Used 4 registers, used 0 barriers
"""
DECODE = (
    "_ZN3gqa4cuda4sm8013decode_kernelINS_8BFloat16ES3_NS1_12DecodeConfigILi64ELi16EEE"
    "LNS1_13DecodeVariantE0EEEvNS1_12DecodeParamsE"
)
PREFILL = (
    "_ZN3gqa4cuda4sm9014prefill_kernelINS_7Float16ENS1_6ConfigILi128ELi176EEELb0EEEv"
    "NS1_16PrefillArgumentsE"
)
PROBE = "_ZN3gqa4cuda12_GLOBAL__N_112probe_kernelENS1_8NoParamsE"  # without a namespace's name


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is missing")
def test_what_ptxas_says_is_understood():
    decode, prefill, probe = parse(LOG.format(decode=DECODE, prefill=PREFILL, probe=PROBE))
    assert decode == Kernel("sm_80", decode.name, registers=120, spills=16, static_shared=768)
    assert (decode.template, decode.head_dim_class) == ("decode_kernel", 64)
    assert decode.config == "gqa::cuda::sm80::DecodeConfig<64, 16>" and decode.must_not_spill
    assert prefill == Kernel("sm_90a", prefill.name, registers=168, spills=0, static_shared=0)
    assert prefill.config == "gqa::cuda::sm90::Config<128, 176>"
    assert (probe.template, probe.config) == ("probe_kernel", None)


def test_the_table_is_of_these_sources():
    key, _ = written()
    assert key == source_key(), "run: python -m tests.emulation.cuda_resources --write"
