"""Images in: TFDS is the one door, grain reads, augmentation runs on the device."""
