//! Text that others have had a say in.

/// Text that may contain what a peer sent, fit for one line of a log or a screen.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_forge_log_lines() {
        assert_eq!(one_line("a\nb\u{1b}[0m"), "a b [0m");
    }
}
