"""Features: against lhotse, against kaldi-native-fbank, and streaming against offline for any cut of the samples."""

import json

import lhotse
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nim4.config import RecipeError
from nim4.corpus.feats import Cmvn, Fbank, KaldiFbank, StreamingFbank, extract_shard, num_frames
from nim4.corpus.manifest import cuts_from_table
from nim4.corpus.table import Row

FBANK = Fbank()
KALDI = KaldiFbank()


def speechlike(num_samples, seed=0, loudness=0.1):
    """Noise under a slow envelope, with pauses, so that frames of very different energy follow each other."""
    rng = np.random.default_rng(seed)
    envelope = np.clip(np.sin(np.arange(num_samples) / 2000), 0, None) ** 2
    return (loudness * envelope * rng.standard_normal(num_samples)).astype(np.float32).clip(-1, 1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("num_samples", [140, 239, 240, 400, 559, 560, 16000, 16077, 16080, 48123])
def test_equals_lhotse_with_the_settings_we_state(num_samples):
    samples = speechlike(num_samples)
    config = lhotse.FbankConfig(sampling_rate=16000, num_filters=80, dither=0.0, snip_edges=False, high_freq=-400.0, window_type="povey")
    expected = lhotse.Fbank(config).extract(samples, 16000)
    found = FBANK.extract(samples)
    assert found.dtype == np.float32
    assert found.shape == (num_frames(num_samples), 80)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loudness", [0.3, 1e-3])
def test_equals_kaldi_native_fbank(loudness):
    samples = speechlike(160_000, loudness=loudness)
    difference = np.abs(FBANK.extract(samples) - KALDI.extract(samples))
    assert difference.max() < 1e-3
    assert difference.mean() < 1e-5
    np.testing.assert_allclose(KALDI.extract(samples, push_samples=1600), KALDI.extract(samples), atol=1e-6)


def test_short_signals_are_mirrored_as_kaldi_does():
    for num_samples in [*range(1, 140, 9), 79, 80, 81, 139]:
        samples = speechlike(num_samples + 3000, seed=num_samples)[3000:]
        expected = KALDI.extract(samples)
        assert FBANK.extract(samples).shape == expected.shape == (num_frames(num_samples), 80)
        np.testing.assert_allclose(FBANK.extract(samples), expected, atol=1e-3)
    assert FBANK.extract(np.zeros(0, np.float32)).shape == (0, 80)


def test_the_number_of_frames_is_lhotses():
    for num_samples in range(0, 2000):
        assert num_frames(num_samples) == lhotse.utils.compute_num_frames(num_samples / 16000, 0.01, 16000)


def test_there_is_no_dither():
    """Dither is random: with it, silence would differ from call to call, and lie above the floor."""
    assert FBANK.lhotse.config.dither == 0.0
    silence = np.zeros(16000, np.float32)
    assert np.array_equal(FBANK.extract(silence), FBANK.extract(silence))
    np.testing.assert_allclose(FBANK.extract(silence), np.log(np.finfo(np.float32).eps), rtol=1e-6)


def test_ten_times_as_loud_is_log_100_more():
    """The scale is linear in the samples: int16 samples would be about 20.8 higher, which training would not notice and decoding would."""
    samples = (0.05 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32).clip(-0.1, 0.1)
    np.testing.assert_allclose(FBANK.extract(10 * samples) - FBANK.extract(samples), np.log(100), atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "rate_hz", "message"),
    [
        (np.zeros(1600, np.int16), 16000, "divide 16-bit samples by 32768"),
        (np.full(1600, 3000, np.float32), 16000, r"in \[-1, 1\], but reach 3000"),
        (np.full(1600, 2.01, np.float32), 16000, "but reach 2.01"),
        (np.full(1600, np.nan, np.float32), 16000, "finite"),
        (np.full(1600, np.inf, np.float32), 16000, "finite"),
        (np.zeros((1, 1600), np.float32), 16000, "one channel"),
        (np.zeros(1600, np.float32), 8000, "16000 Hz, but are at 8000 Hz"),
    ],
)
def test_samples_of_another_kind_are_refused(samples, rate_hz, message):
    with pytest.raises(ValueError, match=message):
        FBANK.extract(samples, rate_hz)
    with pytest.raises(ValueError, match=message):
        StreamingFbank(FBANK, sampling_rate_hz=rate_hz).accept(samples)


def test_an_overshoot_of_the_resampler_is_accepted_and_float64_too():
    assert FBANK.extract(np.full(1600, -1.9, np.float32)).shape == (10, 80)
    found = FBANK.extract(torch.from_numpy(speechlike(1600).astype(np.float64)))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert not found.is_inference()
    np.testing.assert_array_equal(found.numpy(), FBANK.extract(speechlike(1600)))


def streamed(samples, cuts):
    """Frames of the pieces between `cuts`; checks on the way that few samples are kept."""
    stream = StreamingFbank(FBANK)
    frames = []
    for piece in np.split(samples, cuts):
        frames.append(stream.accept(piece))
        assert stream.num_waiting_samples < 400
    frames.append(stream.finish())
    assert stream.num_waiting_samples == 0
    return torch.cat(frames).numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), num_samples=st.integers(0, 4000), seed=st.integers(0, 99), loudness=st.sampled_from([0.3, 1e-3, 1e-6]))
def test_streaming_equals_offline_however_the_samples_are_cut(data, num_samples, seed, loudness):
    samples = speechlike(num_samples + 1000, seed, loudness)[1000:]
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=40)))  # equal neighbours are empty pieces
    found, expected = streamed(samples, cuts), FBANK.extract(samples)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_samples", [0, 1, 79, 80, 139, 399, 400, 401, 1999])
def test_streaming_by_single_samples(num_samples):
    samples = speechlike(num_samples + 1000)[1000:]
    np.testing.assert_allclose(streamed(samples, range(num_samples)), FBANK.extract(samples), rtol=0, atol=1e-5)


def test_streaming_does_not_wait_longer_than_it_must():
    """Frame t needs the samples up to 160 t + 280: what arrives in 640 ms gives all but the frames whose windows cross its end."""
    stream = StreamingFbank(FBANK)
    samples = speechlike(10 * 10240)
    counts = [len(stream.accept(piece)) for piece in np.split(samples, 10)]
    assert counts == [63, *[64] * 9]
    assert len(stream.finish()) == 1


def test_a_finished_stream_takes_nothing_more():
    stream = StreamingFbank(FBANK)
    stream.finish()
    with pytest.raises(RuntimeError, match="new StreamingFbank"):
        stream.accept(np.zeros(10, np.float32))
    with pytest.raises(RuntimeError, match="twice"):
        stream.finish()


# ---------------------------------------------------------------------------------------------------- mean and variance


def test_cmvn_gives_mean_0_and_variance_1(tmp_path):
    rng = np.random.default_rng(0)
    frames = (rng.standard_normal((2000, 80)) * np.linspace(0.5, 4, 80) + np.linspace(-15, 5, 80)).astype(np.float32)
    cmvn = Cmvn()
    for piece in np.split(frames, [1, 700]):
        cmvn.add(piece)
    cmvn.save(tmp_path / "cmvn.json")
    loaded = Cmvn.load(tmp_path / "cmvn.json")
    assert json.loads((tmp_path / "cmvn.json").read_text())["num_frames"] == 2000
    assert loaded.mean.dtype == loaded.std.dtype == torch.float32
    assert torch.equal(loaded.mean, cmvn.mean)
    assert torch.equal(loaded.std, cmvn.std)
    for applied in (loaded.apply(frames), loaded.apply(torch.from_numpy(frames)).numpy()):
        assert applied.dtype == np.float32
        np.testing.assert_allclose(applied.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(applied.std(axis=0), 1, atol=1e-4)


def test_cmvn_is_summed_in_float64():
    """In float32 the variance of so many frames around -15 would be lost."""
    frames = np.full((1000, 80), -15.9, np.float32)
    frames[::2] += 1e-1
    cmvn = Cmvn.merge([Cmvn()], [1])
    for _ in range(300):
        cmvn.add(frames)
    np.testing.assert_allclose(cmvn.std.numpy(), 0.05, rtol=1e-3)


def test_cmvn_merge_weighs_corpora():
    one, other = Cmvn(), Cmvn()
    one.add(np.full((100, 80), 2.0))
    other.add(np.full((300, 80), 6.0))
    np.testing.assert_allclose(Cmvn.merge([one, other]).mean, 5.0)
    np.testing.assert_allclose(Cmvn.merge([one, other], [1, 1 / 3]).mean, 4.0)
    np.testing.assert_allclose(Cmvn.merge([one, other], [1, 1 / 3]).std, 2.0)
    assert one.num_frames == 100


def test_cmvn_of_a_constant_bin_does_not_divide_by_zero():
    cmvn = Cmvn()
    cmvn.add(np.full((10, 80), 3.0, np.float32))
    assert np.all(cmvn.apply(np.full((1, 80), 3.0, np.float32)) == 0)
    assert np.isfinite(cmvn.apply(np.zeros((1, 80), np.float32))).all()


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"num_frames": 1, "sum": [1], "sum_squares": [1]}', json.dumps({"num_frames": 0, "sum": [0] * 80, "sum_squares": [0] * 80})],
)
def test_cmvn_that_cannot_be_used_is_told(tmp_path, content):
    (tmp_path / "cmvn.json").write_text(content)
    with pytest.raises(RecipeError, match=r"cmvn\.json"):
        Cmvn.load(tmp_path / "cmvn.json")
    with pytest.raises(ValueError, match="at least one frame"):
        Cmvn().mean  # noqa: B018


# ------------------------------------------------------------------------------------------------------------ a whole corpus


def test_a_shard_lists_what_it_cannot_read(tmp_path):
    for name in "abcd":
        soundfile.write(tmp_path / f"{name}.wav", speechlike(16000, seed=ord(name)), 16000)
    soundfile.write(tmp_path / "loud.wav", 3000 * speechlike(16000), 16000, subtype="FLOAT")
    cuts, _ = cuts_from_table([Row(name, tmp_path / f"{name}.wav", "x", "s", "zh") for name in ["a", "b", "c", "d", "loud"]])
    (tmp_path / "b.wav").unlink()
    (tmp_path / "c.wav").write_bytes(b"RIFF but not really")
    shard = extract_shard(list(cuts), tmp_path / "0.lca")
    assert [row["id"] for row in shard.unreadable] == ["b", "c", "loud"]
    assert "but reach" in shard.unreadable[2]["error"]
    assert all(row["path"] == str(tmp_path / f"{row['id']}.wav") for row in shard.unreadable)
    assert [cut.id for cut in shard.cuts] == ["a", "d"]
    for cut in shard.cuts:
        expected = FBANK.extract(cut.load_audio()[0])
        stored = cut.load_features()
        assert stored.shape == expected.shape == (100, 80)
        assert np.abs(stored - expected).max() <= 2**-6 + 1e-5, "lilcom keeps steps of 2^-5"
    assert shard.cmvn.num_frames == 200
    assert shard.audio_s == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_frames():
    samples = 0.1 * torch.randn(5, 10_800, generator=torch.Generator().manual_seed(0))
    samples[3:] *= torch.linspace(0, 1, 10_800) ** 8  # from silence on
    torch.testing.assert_close(Fbank("cuda").frames_of_padded(samples), FBANK.frames_of_padded(samples), atol=1e-3, rtol=0)
