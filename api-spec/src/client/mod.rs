//! Blocking clients. Every call has a deadline; nothing here needs an async runtime.

pub mod agent;
pub mod linux;
pub mod metrics;
pub mod rest;
pub mod unix;
pub mod vm;

pub use agent::AgentClient;
pub use rest::RestClient;
pub use vm::VmClient;
