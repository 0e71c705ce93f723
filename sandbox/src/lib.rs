//! What a process and each of its threads may do.
//!
//! Two halves. *Confinement* is for a process as a whole, and comes first: [`confinement`] takes away what its user and the kernel
//! would let it do. *Filters* are for each kind of thread: a [`table`] says which system calls it may make, [`build`] makes programs
//! of tables while a program is built, and [`filter`] gives them to the kernel. A call that is in no table ends the process, and
//! [`trap`] says which it was.

pub mod build;
pub mod confinement;
pub mod filter;
pub mod groups;
pub mod options;
pub mod table;
pub mod trap;

pub use seccompiler::sock_filter as Instruction;
