//! Paths in documents. An empty one names nothing, and what the system says of it names neither the field nor the fault.
//! That of a vsock device is looked at where its socket is made: what is kept of the configuration of a saved machine has an empty one.

use serde::de::{Deserialize, Deserializer, Error};
use std::path::PathBuf;

/// A path that is not empty.
pub(crate) fn one<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(from)?;
    if path.as_os_str().is_empty() { Err(D::Error::custom("the path is empty; name a file")) } else { Ok(path) }
}

/// One that is not empty, or none.
pub(crate) fn some<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    /// A path, as the field has it.
    #[derive(serde::Deserialize)]
    #[serde(transparent)]
    struct Path(#[serde(deserialize_with = "one")] PathBuf);
    Ok(Option::<Path>::deserialize(from)?.map(|Path(path)| path))
}

#[cfg(test)]
mod tests {
    use crate::snapshot::{SnapshotCreate, SnapshotLoad};
    use crate::strict;
    use crate::vm::VmConfig;

    #[test]
    fn an_empty_path_is_refused_by_the_name_of_its_field() {
        let refused = |result: Result<(), strict::DocumentError>| result.unwrap_err().to_string();
        let config = |text: &str| strict::from_slice::<VmConfig>(text.as_bytes()).map(drop);
        for (document, field) in [
            (r#"{"boot-source": {"kernel_image_path": ""}}"#, "boot-source.kernel_image_path"),
            (r#"{"boot-source": {"kernel_image_path": "k", "initrd_path": ""}}"#, "boot-source.initrd_path"),
            (r#"{"drives": [{"drive_id": "a", "path_on_host": ""}]}"#, "drives[0].path_on_host"),
            (r#"{"serial": {"serial_out_path": ""}}"#, "serial.serial_out_path"),
            (r#"{"logger": {"log_path": ""}}"#, "logger.log_path"),
            (r#"{"metrics": {"metrics_path": ""}}"#, "metrics.metrics_path"),
            (r#"{"saved-state": {"path": ""}}"#, "saved-state.path"),
        ] {
            let words = refused(config(document));
            assert!(words.starts_with(&format!("{field}: the path is empty")), "{words}");
        }
        let create = |text: &str| strict::from_slice::<SnapshotCreate>(text.as_bytes()).map(drop);
        assert!(refused(create(r#"{"snapshot_path": ""}"#)).starts_with("snapshot_path: the path is empty"));
        let named = r#"{"snapshot_path": "s", "mem_file_path": ""}"#;
        assert!(refused(create(named)).starts_with("mem_file_path: the path is empty"));
        create(r#"{"snapshot_path": "s", "mem_file_path": null}"#).unwrap();
        let load = |text: &str| strict::from_slice::<SnapshotLoad>(text.as_bytes()).map(drop);
        let backend = r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": ""}}"#;
        assert!(refused(load(backend)).starts_with("mem_backend.backend_path: the path is empty"));
        load(r#"{"snapshot_path": "s"}"#).unwrap();
    }
}
