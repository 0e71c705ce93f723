//! For build scripts: makes programs of tables, as Rust source. A process that starts has no time to do that.

use crate::table::{Rule, TableError, compile};
use std::fmt::Write;
use std::io;
use std::path::Path;

/// Why there are no programs.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A table.
    #[error("the table {0}: {1}")]
    Table(String, TableError),
    /// The source file.
    #[error("cannot write the programs: {0}")]
    Write(#[from] io::Error),
}

/// Writes the program of each table, under its name, to a file to be included.
pub fn write_programs(to: &Path, tables: &[(&str, &[&[Rule]])]) -> Result<(), BuildError> {
    let mut source = String::new();
    for (name, groups) in tables {
        let program = compile(groups).map_err(|e| BuildError::Table((*name).to_owned(), e))?;
        // Writing to a string does not fail.
        let _ = writeln!(source, "static {name}: [sandbox::Instruction; {}] = [", program.len());
        for instruction in &program {
            let _ = writeln!(source, "    sandbox::{instruction:?},");
        }
        source.push_str("];\n");
    }
    Ok(std::fs::write(to, source.replace("sock_filter", "Instruction"))?)
}
