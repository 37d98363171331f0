//! `medes deploy`: create a function or put a new version in its place.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use medes_core::{FunctionName, Layout, Tenant};
use serde::Serialize;
use serde_json::{Map, Value};

use super::policy::SettingFlags;
use super::{Global, function_name};
use crate::failure::{Failure, Outcome};
use crate::output::Format;
use crate::units::Period;

/// Create a function, or put a new version in its place.
#[derive(Debug, Args)]
pub struct DeployCommand {
    /// The function's name: 1 to 64 letters, digits, hyphens and underscores.
    #[arg(value_parser = function_name)]
    name: FunctionName,
    /// The code: a directory or a .zip file.
    path: PathBuf,
    /// The runtime; `medes runtime list` shows what there is.
    #[arg(long)]
    runtime: String,
    /// The handler, in the runtime's notation, such as app.handler.
    #[arg(long)]
    handler: String,
    /// A layer: a directory or a .zip file, merged below /opt; repeatable, in order.
    #[arg(long = "layer", value_name = "PATH")]
    layers: Vec<PathBuf>,
    /// An environment variable for the function; repeatable.
    #[arg(long = "env", value_name = "KEY=VALUE", value_parser = key_value)]
    environment: Vec<(String, String)>,
    /// Memory limit of one sandbox, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u32,
    /// How long one request may run.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    timeout: Period,
    /// Which sandboxes have the same address-space layout.
    #[arg(long, default_value = "function", value_parser = layout)]
    layout: Layout,
    /// At most this many sandboxes at once; 0: the platform's limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_sandboxes: u32,
    /// Whose function it is. Pages of different tenants are never compared with each other.
    #[arg(long, default_value = "default")]
    tenant: Tenant,
    /// A description.
    #[arg(long, default_value = "")]
    description: String,
    #[command(flatten, next_help_heading = "Policy for this function alone")]
    policy: SettingFlags,
    #[command(flatten)]
    format: Format,
}

/// The body of `PUT /v1/functions/{name}`.
#[derive(Clone, Debug, Serialize)]
pub struct Deploy {
    /// The runtime's name.
    pub runtime: String,
    /// The handler.
    pub handler: String,
    /// Where the code is.
    pub code: Code,
    /// Directories or archives that are merged below `/opt`.
    pub layers: Vec<PathBuf>,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// Memory limit of one sandbox, MiB.
    pub memory_mib: u32,
    /// How long one request may run, milliseconds.
    pub timeout_ms: u64,
    /// At most this many sandboxes; 0 for the platform's limit.
    pub max_sandboxes: u32,
    /// Which sandboxes share a layout.
    pub layout: Layout,
    /// Whose function it is.
    pub tenant: Tenant,
    /// A description.
    pub description: String,
    /// What holds of the policy for this function alone; what was set before if empty.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub policy: Map<String, Value>,
}

/// Where a function's code is.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// A directory that the platform sees too; it takes a copy.
    Directory(PathBuf),
    /// A ZIP archive in base64.
    Zip(String),
}

impl DeployCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the code can't be read, or the platform does not take it.
    pub fn run(self, global: &Global) -> Outcome {
        let client = global.client()?;
        let usage = |e: anyhow::Error| Failure::Usage(format!("{e:#}"));
        let code = code(&self.path, client.is_local()).map_err(usage)?;
        let layers = self
            .layers
            .iter()
            .map(|l| l.canonicalize().with_context(|| format!("layer {}", l.display())))
            .collect::<Result<_, _>>()
            .map_err(usage)?;
        let deploy = Deploy {
            runtime: self.runtime,
            handler: self.handler,
            code,
            layers,
            environment: self.environment.into_iter().collect(),
            memory_mib: self.memory,
            timeout_ms: self.timeout.millis(),
            max_sandboxes: self.max_sandboxes,
            layout: self.layout,
            tenant: self.tenant,
            description: self.description,
            policy: self.policy.given(),
        };
        let view: Value = client.put(&format!("/v1/functions/{}", self.name), &deploy)?;
        self.format.print(&view, || {
            format!("deployed {} ({}, {})\n", self.name, deploy.runtime, deploy.handler)
        });
        Ok(())
    }
}

fn code(path: &Path, platform_is_local: bool) -> anyhow::Result<Code> {
    let absolute = path.canonicalize().with_context(|| path.display().to_string())?;
    if !absolute.is_dir() {
        if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("zip")) {
            bail!("{}: the code must be a directory or a .zip file", path.display());
        }
        let archive = std::fs::read(&absolute).with_context(|| path.display().to_string())?;
        return Ok(Code::Zip(STANDARD.encode(archive)));
    }
    if platform_is_local {
        return Ok(Code::Directory(absolute));
    }
    let archive = pack(&absolute).with_context(|| format!("packing {}", path.display()))?;
    Ok(Code::Zip(STANDARD.encode(archive)))
}

/// A ZIP archive of a directory. Symbolic links are followed; what is neither file nor directory
/// is an error.
fn pack(root: &Path) -> anyhow::Result<Vec<u8>> {
    use std::os::unix::fs::PermissionsExt;

    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            let metadata = path.metadata().with_context(|| path.display().to_string())?;
            if metadata.is_dir() {
                // A link to a directory above would never end.
                if path.components().count() > root.components().count() + 64 {
                    bail!("{}: more than 64 directories deep", path.display());
                }
                pending.push(path);
                continue;
            }
            if !metadata.is_file() {
                bail!("{}: neither a file nor a directory", path.display());
            }
            let name = path.strip_prefix(root)?.to_str().context("a name that is not UTF-8")?;
            let options = zip::write::SimpleFileOptions::default()
                .unix_permissions(metadata.permissions().mode() & 0o777);
            archive.start_file(name, options)?;
            archive.write_all(&std::fs::read(&path)?)?;
        }
    }
    Ok(archive.finish()?.into_inner())
}

fn key_value(s: &str) -> Result<(String, String), String> {
    match s.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it looks like KEY=VALUE".to_owned()),
    }
}

fn layout(s: &str) -> Result<Layout, String> {
    match s {
        "function" => Ok(Layout::Function),
        "shared" => Ok(Layout::Shared),
        "random" => Ok(Layout::Random),
        _ => Err("function, shared or random".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_for_a_distant_platform_goes_as_an_archive() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("lib")).unwrap();
        std::fs::write(dir.path().join("app.py"), "def handler(e, c): pass\n").unwrap();
        std::fs::write(dir.path().join("lib/x.py"), "x = 1\n").unwrap();
        assert!(matches!(code(dir.path(), true), Ok(Code::Directory(_))));
        let Ok(Code::Zip(text)) = code(dir.path(), false) else { panic!("no archive") };
        let mut archive =
            zip::ZipArchive::new(Cursor::new(STANDARD.decode(text).unwrap())).unwrap();
        let mut names: Vec<_> =
            archive.file_names().map(|name| name.unwrap().into_owned()).collect();
        names.sort();
        assert_eq!(names, ["app.py", "lib/x.py"]);
        assert_eq!(
            std::io::read_to_string(archive.by_name("lib/x.py").unwrap()).unwrap(),
            "x = 1\n"
        );
    }

    #[test]
    fn an_endless_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("self")).unwrap();
        assert!(pack(dir.path()).is_err());
    }
}
