//! What the environment says about object stores.

use std::fmt;

/// Variables whose values are never shown.
const SECRET: [&str; 3] = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN"];

/// Variables that say where credentials come from, or that none are needed.
const CREDENTIALS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
];

/// The variables of the environment that begin with `AWS_`.
#[derive(Clone, Default)]
pub struct Settings(Vec<(String, String)>);

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Settings {
    /// Takes those that matter from a list of variables.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Settings {
        Settings(variables.into_iter().filter(|(name, _)| name.starts_with("AWS_")).collect())
    }

    /// Those of this process.
    pub fn from_env() -> Settings {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Settings::new(std::env::vars_os().filter_map(text))
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Whether anything is said of credentials.
    pub fn have_credentials(&self) -> bool {
        CREDENTIALS.iter().any(|name| self.get(name).is_some())
    }

    /// Replaces secrets in a text.
    pub fn hide_secrets(&self, text: &str) -> String {
        let secrets = self.iter().filter(|(name, value)| SECRET.contains(name) && !value.is_empty());
        secrets.fold(text.to_owned(), |text, (name, value)| text.replace(value, &format!("[{name}]")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_neither_shown_nor_repeated() {
        let pairs = [("AWS_SECRET_ACCESS_KEY", "hush"), ("AWS_REGION", "north"), ("PATH", "/bin"), ("AWS_TOKEN", "")];
        let settings = Settings::new(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!((settings.get("AWS_REGION"), settings.get("PATH")), (Some("north"), None));
        assert!(!format!("{settings:?}").contains("hush"));
        assert_eq!(settings.hide_secrets("they said hush"), "they said [AWS_SECRET_ACCESS_KEY]");
    }
}
