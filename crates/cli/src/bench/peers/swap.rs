//! Compressed swap: zram, and zswap before a swap file.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use medes_memory::leave::{own_pages, page_out};
use nix::fcntl::{FallocateFlags, fallocate};

use super::setting::{Setting, read, write};
use super::{FREEZE_LIMIT, Keeping, Sandbox};

/// The size of the swap device; it takes memory, or blocks of the disk, only as it fills.
const SWAP_BYTES: u64 = 4 << 30;

/// Compressors from the best ratio to the worst, as far as a request can wait for them.
const COMPRESSORS: [&str; 5] = ["zstd", "lz4hc", "lzo-rle", "lzo", "lz4"];

/// The kernel's handle of the zram driver: devices are made and removed by it.
const ZRAM_CONTROL: &str = "/sys/class/zram-control";

const ZSWAP: &str = "/sys/module/zswap/parameters";

/// A swap device in use; not any more when this is dropped.
struct SwapDevice(PathBuf);

impl SwapDevice {
    fn start(path: PathBuf) -> Result<Self> {
        run("mkswap", &[path.as_os_str()])?;
        // Before whatever other swap the host has.
        run("swapon", &["--priority".as_ref(), "32767".as_ref(), path.as_os_str()])?;
        Ok(Self(path))
    }
}

impl Drop for SwapDevice {
    fn drop(&mut self) {
        if let Err(error) = run("swapoff", &[self.0.as_os_str()]) {
            eprintln!("medes: {error:#}; a reboot removes it");
        }
    }
}

/// A tool of util-linux.
fn run(tool: &str, arguments: &[&std::ffi::OsStr]) -> Result<()> {
    let output = Command::new(tool)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .with_context(|| format!("running {tool}, which is part of util-linux"))?;
    if !output.status.success() {
        bail!("{tool}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn freeze_and_page_out(sandbox: &Sandbox) -> Result<()> {
    // Where cgroup version 2 has the memory controller, the platform forbids its sandboxes to swap.
    let limit = sandbox.cgroup.path().join("memory.swap.max");
    if limit.exists() {
        write(&limit, "max")?;
    }
    sandbox.cgroup.freeze(FREEZE_LIMIT)?;
    for process in sandbox.cgroup.processes()? {
        page_out(process, &own_pages(process)?).context("paging out")?;
    }
    Ok(())
}

/// A device made for the time of a measurement.
struct ZramDevice {
    number: u32,
}

impl ZramDevice {
    fn make() -> Result<Self> {
        let add = Path::new(ZRAM_CONTROL).join("hot_add");
        let number = read(&add).context(
            "no zram in this kernel (CONFIG_ZRAM), or its module is not loaded (modprobe zram)",
        )?;
        Ok(Self { number: number.parse().context("the number of a zram device")? })
    }

    fn setting(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/zram{}/{name}", self.number))
    }
}

impl Drop for ZramDevice {
    fn drop(&mut self) {
        let remove = Path::new(ZRAM_CONTROL).join("hot_remove");
        if let Err(error) = write(&remove, &self.number.to_string()) {
            eprintln!("medes: removing a zram device: {error:#}");
        }
    }
}

/// Frozen, in zram.
pub(super) struct Zram {
    // The order matters: swapped back in before the device goes.
    _swap: SwapDevice,
    device: ZramDevice,
    compressor: String,
}

impl Zram {
    pub(super) fn start() -> Result<Self> {
        let device = ZramDevice::make()?;
        let known = read(&device.setting("comp_algorithm"))?;
        let known: Vec<_> = known.split(' ').map(|name| name.trim_matches(['[', ']'])).collect();
        let best = COMPRESSORS.into_iter().find(|name| known.contains(name));
        let compressor = best.or(known.first().copied()).context("no compressor")?.to_owned();
        write(&device.setting("comp_algorithm"), &compressor)?;
        write(&device.setting("disksize"), &SWAP_BYTES.to_string())?;
        let swap = SwapDevice::start(format!("/dev/zram{}", device.number).into())?;
        Ok(Self { _swap: swap, device, compressor })
    }
}

impl Keeping for Zram {
    fn note(&self) -> String {
        format!("frozen, MADV_PAGEOUT into zram ({})", self.compressor)
    }

    fn put_away(&mut self, sandbox: &Sandbox) -> Result<()> {
        freeze_and_page_out(sandbox)
    }

    fn bring_back(&mut self, sandbox: &Sandbox) -> Result<()> {
        Ok(sandbox.cgroup.thaw()?)
    }

    fn store_bytes(&mut self) -> Result<u64> {
        // The kernel's Documentation/admin-guide/blockdev/zram.rst: the third is mem_used_total.
        let text = read(&self.device.setting("mm_stat"))?;
        let used = text.split_whitespace().nth(2).and_then(|n| n.parse().ok());
        used.context("mm_stat of zram")
    }
}

/// Frozen, in zswap before a swap file.
pub(super) struct Zswap {
    _swap: SwapDevice,
    _file: tempfile::TempPath,
    _settings: Vec<Setting>,
    compressor: String,
    before: u64,
}

impl Zswap {
    /// With a swap file in `directory`.
    pub(super) fn start(directory: &Path) -> Result<Self> {
        let parameter = |name: &str| Path::new(ZSWAP).join(name);
        read(&parameter("enabled")).context("no zswap in this kernel (CONFIG_ZSWAP)")?;
        // Only once it is enabled does it look whether the kernel has a compressor.
        let mut settings = vec![Setting::set(parameter("enabled"), "Y")?];
        let mut compressor = read(&parameter("compressor"))?;
        for name in COMPRESSORS {
            if let Ok(setting) = Setting::set(parameter("compressor"), name)
                && read(&parameter("compressor")).is_ok_and(|now| now == name)
            {
                settings.push(setting);
                name.clone_into(&mut compressor);
                break;
            }
        }
        let file = tempfile::Builder::new().prefix("swap-").tempfile_in(directory)?;
        let mode = std::fs::Permissions::from_mode(0o600);
        file.as_file().set_permissions(mode)?;
        reserve(file.as_file()).context("room for a swap file")?;
        let file = file.into_temp_path();
        let swap = SwapDevice::start(file.to_path_buf())?;
        let before = pool_bytes()?;
        Ok(Self { _swap: swap, _file: file, _settings: settings, compressor, before })
    }
}

fn reserve(file: &File) -> nix::Result<()> {
    fallocate(file, FallocateFlags::empty(), 0, SWAP_BYTES as i64)
}

/// What zswap keeps, compressed.
fn pool_bytes() -> Result<u64> {
    let text = read(Path::new("/proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Zswap:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no Zswap")? * 1024)
}

impl Keeping for Zswap {
    fn note(&self) -> String {
        format!("frozen, MADV_PAGEOUT into zswap ({}) before a swap file", self.compressor)
    }

    fn put_away(&mut self, sandbox: &Sandbox) -> Result<()> {
        freeze_and_page_out(sandbox)
    }

    fn bring_back(&mut self, sandbox: &Sandbox) -> Result<()> {
        Ok(sandbox.cgroup.thaw()?)
    }

    fn store_bytes(&mut self) -> Result<u64> {
        Ok(pool_bytes()?.saturating_sub(self.before))
    }
}
