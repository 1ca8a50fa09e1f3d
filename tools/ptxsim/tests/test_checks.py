"""Deliberate mistakes must be reported, with kernel, block, thread and source line."""

import numpy as np
import pytest

from tools import ptxsim

from . import test_flash


def run(cuda, name, args, block=128, **kw):
    return cuda("basic.cu").launch(name, 1, block, args, **kw)


@pytest.mark.parametrize("seed", range(4))
def test_missing_sync_reported(cuda, seed):
    with pytest.raises((ptxsim.RaceError, ptxsim.MemoryFault)) as e:
        run(cuda, "bad_race", [np.zeros(128, "f4")], seed=seed)
    assert e.value.kind in ("race", "uninitialised") and "basic.cu:" in str(e.value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["bad_race_ww", "bad_war"])
def test_races(cuda, name, seed):
    with pytest.raises(ptxsim.RaceError) as e:
        run(cuda, name, [np.zeros(128, "f4")], seed=seed)
    assert str(e.value).count("basic.cu:") == 2


def test_checks_can_be_disabled(cuda):
    run(cuda, "bad_race_ww", [np.zeros(128, "f4")], check=False)


def test_checks_can_be_chosen(cuda):
    o = np.zeros(64, "f4")
    run(cuda, "bad_uninit", [o], block=64, check={"race"})
    assert np.isnan(o[20])
    run(cuda, "bad_race_ww", [np.zeros(128, "f4")], check={"uninit"})
    with pytest.raises(ptxsim.RaceError):
        run(cuda, "bad_race_ww", [np.zeros(128, "f4")], check={"race"})


def test_out_of_bounds_write(cuda):
    with pytest.raises(ptxsim.MemoryFault) as e:
        run(cuda, "bad_oob", [np.zeros(200, "f4"), 3])
    s = str(e.value)
    assert e.value.kind == "out-of-bounds" and "thread (100, 0, 0)" in s and "block (0, 0, 0)" in s
    assert "bad_oob" in s and "PTX line" in s and "basic.cu:" in s and "st.global" in s


def test_out_of_bounds_vector_read(cuda):
    with pytest.raises(ptxsim.MemoryFault, match="thread .63, 0, 0."):
        run(cuda, "bad_oob_read", [np.zeros((64, 4), "f4"), np.zeros((64, 4), "f4")], block=64)


def test_shared_out_of_bounds(cuda):
    with pytest.raises(ptxsim.MemoryFault, match="out-of-bounds shared read"):
        run(cuda, "bad_smem_oob", [np.zeros(32, "f4")], block=32)


def test_misaligned(cuda):
    with pytest.raises(ptxsim.MemoryFault) as e:
        run(cuda, "bad_misaligned", [np.zeros(1024, "u1"), np.zeros((32, 4), "i4")], block=32)
    assert e.value.kind == "misaligned"


def test_uninitialised(cuda):
    with pytest.raises(ptxsim.MemoryFault, match="never written"):
        run(cuda, "bad_uninit", [np.zeros(64, "f4")], block=64)
    o = np.zeros(64, "f4")
    run(cuda, "bad_uninit", [o], block=64, check=False)
    assert np.isnan(o[20])


def test_deadlock(cuda):
    with pytest.raises(ptxsim.DeadlockError, match="waiting on barrier"):
        run(cuda, "bad_deadlock", [np.zeros(64, "i4")], block=64)


def test_barrier_divergence(cuda):
    with pytest.raises(ptxsim.DeadlockError, match="divergence|deadlock"):
        run(cuda, "bad_barrier", [np.zeros(64, "i4")], block=64)


def test_endless_spin(cuda):
    with pytest.raises(ptxsim.DeadlockError, match="no progress"):
        run(cuda, "bad_spin", [np.zeros(1, "i4")], block=32, spin_limit=2000)


def test_shuffle_with_missing_lanes(cuda):
    with pytest.raises(ptxsim.DeadlockError, match="lanes"):
        run(cuda, "bad_shfl", [np.zeros(32, "i4")], block=32)


def test_missing_cp_async_wait(cuda):
    with pytest.raises(ptxsim.MemoryFault, match="pending asynchronous copy"):
        test_flash.run(cuda, "SKIP_WAIT")


def test_missing_syncthreads_in_pipeline(cuda):
    with pytest.raises((ptxsim.RaceError, ptxsim.MemoryFault)):
        test_flash.run(cuda, "SKIP_SYNC")


def test_launch_mistakes(cuda):
    m = cuda("basic.cu")
    with pytest.raises(ptxsim.PtxError, match="takes 4 arguments"):
        m.launch("vadd", 1, 32, [1])
    with pytest.raises(ptxsim.PtxError, match="no kernel"):
        m.launch("nothing", 1, 32, [])
