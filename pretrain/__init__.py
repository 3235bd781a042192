"""DINOv2-style self-supervised pretraining of vision transformers."""
