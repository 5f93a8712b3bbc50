"""Augmentation on the device: exactly the windows, mirrors and blends it says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxres.data import augment, images

BATCH = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)), jnp.uint8)
KEYS = augment.example_keys(jax.random.key(0), 6)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_crop_is_one_of_the_windows_of_the_padded_image(self):
        out = self.variant(augment.random_crop)(BATCH, KEYS)
        padded = np.pad(BATCH, ((0, 0), (1, 1), (1, 1), (0, 0)))
        for image, whole in zip(out, padded, strict=True):
            windows = [whole[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
            assert any(np.array_equal(image, window) for window in windows)

    @chex.variants(with_jit=True, without_jit=True)
    def test_flip_gives_the_image_or_its_mirror(self):
        keys = augment.example_keys(jax.random.key(1), 600)
        many = jnp.tile(BATCH, (100, 1, 1, 1))
        out = self.variant(augment.random_flip)(many, keys)
        flipped = np.array([np.array_equal(o, b[:, ::-1]) for o, b in zip(out, many, strict=True)])
        kept = np.array([np.array_equal(o, b) for o, b in zip(out, many, strict=True)])
        assert np.all(flipped ^ kept) and abs(flipped.mean() - 0.5) < 0.07


def test_normalize_is_the_published_formula():
    out = augment.normalize(BATCH, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    expected = (np.asarray(BATCH) / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert augment.normalize(BATCH, (0.5,) * 3, (0.5,) * 3, jnp.bfloat16).dtype == jnp.bfloat16


def test_policy_none_is_normalize():
    moments = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    chex.assert_trees_all_equal(
        augment.train(BATCH, KEYS, "none", *moments), augment.normalize(BATCH, *moments)
    )


def test_draws_depend_on_the_place_in_the_batch_and_not_on_the_shard():
    key = jax.random.key(3)
    whole = augment.apply(BATCH, augment.example_keys(key, 6), "crop_flip")
    half = augment.apply(BATCH[3:], augment.example_keys(key, 3, offset=3), "crop_flip")
    chex.assert_trees_all_equal(whole[3:], half)


def test_mixup_blends_neighbours_and_their_targets_alike():
    pictures, targets = BATCH.astype(jnp.float32), jnp.eye(6)
    mixed, soft = augment.mixup(pictures, targets, jax.random.key(0), 1.0)
    share = soft[0, 0]
    assert 0 < share < 1
    np.testing.assert_allclose(soft[1], share * targets[1] + (1 - share) * targets[0], atol=1e-6)
    np.testing.assert_allclose(
        mixed[4], share * pictures[4] + (1 - share) * pictures[5], rtol=1e-5, atol=1e-3
    )


def test_cutmix_pastes_a_box_and_weighs_targets_by_its_area():
    pictures, targets = BATCH.astype(jnp.float32), jnp.eye(6)
    for seed in range(20):
        mixed, soft = augment.cutmix(pictures, targets, jax.random.key(seed), 1.0)
        pasted = np.all(np.asarray(mixed == pictures[jnp.array([1, 0, 3, 2, 5, 4])]), (0, 3))
        kept = np.all(np.asarray(mixed == pictures), (0, 3))
        assert np.all(pasted | kept)
        np.testing.assert_allclose(soft[0, 0], 1 - pasted.mean(), atol=1e-6)
        rows, columns = np.where(pasted)
        if len(rows):
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert box == len(rows)


def test_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown augmentation 'cutout' .accepted: none, crop"):
        augment.apply(BATCH, KEYS, "cutout")


def test_every_default_policy_exists_and_digits_are_not_mirrored():
    assert augment.default_policy("digits") == "crop"
    for name in ("digits", "mnist", "imagenet2012", "anything"):
        assert augment.check_policy(augment.default_policy(name))


@pytest.mark.parametrize("shape", [(300, 200, 3), (40, 500, 3), (100, 100, 1)])
def test_host_crops_have_the_size_asked_for(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    rng = np.random.default_rng(1)
    for size in (32, 224):
        assert images.centre_crop(image, size).shape == (size, size, shape[2])
        for _ in range(5):
            crop = images.random_resized_crop(image, size, rng)
            assert crop.shape == (size, size, shape[2])


def test_channels_are_made_to_fit():
    colour = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    grey = images.to_channels(colour, 1)
    assert grey.shape == (5, 4, 1)
    assert images.to_channels(grey, 3).shape == (5, 4, 3)
    assert images.to_channels(grey[..., 0], 1).shape == (5, 4, 1)
    with pytest.raises(ValueError, match="an image of 3 channels cannot become one of 5"):
        images.to_channels(colour, 5)
