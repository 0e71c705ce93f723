//! Fork: a machine that runs, and goes on, becomes several. Nothing of it is written to a disk.
//!
//! ```text
//!   give     event loop:  pause -> device, vCPU and VM state -> disks -> freeze, or copy of what is the guest's own -> resume
//!            thread:      seal -> one call to each of the other vmms, with descriptors -> their answers
//!   receive  other vmm:   check -> shell -> map the lowest file, and the longer runs of the layers; copy the shorter ones -> state -> run
//! ```
//!
//! What a guest that was booted here has written is its image, from then on; nothing of it is copied. A clone's own pages are copied into
//! a layer over the image that it is a view of, and a fork of a fork has one layer more, until they are copied into one
//! ([`GuestRam::layers`](crate::memory::GuestRam::layers)). All clones of a fork share these files, which nobody can write. Where a page
//! server has what the layers lie over, it serves each of them as it serves the machine itself.
//!
//! Overlays of disks are frozen, and their layers shared likewise, over the image that is open here; each side goes on in a layer of its
//! own ([`disks`](super::disks)).

pub mod give;
pub mod receive;
