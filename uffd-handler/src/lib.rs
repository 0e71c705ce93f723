//! Page server.
