//! Virtio-vsock connections.
