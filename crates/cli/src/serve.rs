//! `medes serve`: controller, node and HTTP API in one process.

use std::net::TcpListener;

use anyhow::{Context, ensure};
use medes_attach::RUN_DIR;
use medes_controller::{Controller, ControllerConfig};
use medes_core::NodeId;
use medes_keeper::KeeperConfig;
use medes_memory::features::KernelFeatures;
use medes_node::{DedupConfig, Node, NodeConfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::commands::attach;
use crate::config::{Config, Log, LogFormat};

/// The hidden subcommand that makes this program a keeper.
pub const KEEPER_COMMAND: &str = "keeper";

/// Descriptors that a daemon or a keeper may want: a keeper has seven for each sandbox, and logins
/// usually allow 1024.
const DESCRIPTORS: u64 = 1 << 20;

/// Runs the platform until it is told to stop.
///
/// # Errors
/// If it can't start.
pub fn run(config: Config) -> anyhow::Result<()> {
    log_to_stderr(&config.log)?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "medes serve makes namespaces, cgroups and mounts, and reads other processes' memory: \
         run it as root"
    );
    if let Err(missing) = KernelFeatures::probe().check() {
        anyhow::bail!("this host can't deduplicate: it lacks {}; {}", missing.what, missing.remedy);
    }
    raise_descriptor_limit();
    let listener = TcpListener::bind(config.api.listen).with_context(|| {
        format!(
            "cannot listen on {}; is another platform running? ([api] listen in the configuration \
             sets another address)",
            config.api.listen
        )
    })?;
    listener.set_nonblocking(true)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(&config, listener))
}

async fn serve(config: &Config, listener: TcpListener) -> anyhow::Result<()> {
    // Before anything is made: a signal from now on means an orderly end.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hand_over = signal(SignalKind::user_defined2())?;
    let (node, events) = Node::open(node_config(config)?).await?;
    let opened = Controller::open(controller_config(config), node.clone(), events);
    let controller = match opened {
        Ok(controller) => controller,
        Err(error) => {
            // What an earlier daemon left waits for one that can start.
            if node.took_over() {
                node.leave();
            } else {
                node.close().await;
            }
            return Err(error.into());
        }
    };
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tracing::info!(
        listen = %config.api.listen,
        data = %config.node.data_dir.display(),
        "the platform is ready"
    );
    let stop = {
        let (controller, keep) = (controller.clone(), config.lifecycle.keep_sandboxes);
        async move {
            let keep = tokio::select! {
                _ = terminate.recv() => keep,
                _ = interrupt.recv() => keep,
                _ = hand_over.recv() => true,
                // Whoever asks for the platform's end by its API means all of it.
                () = controller.shutdown_requested() => false,
            };
            if keep {
                tracing::info!("leaving the sandboxes to the next `medes serve`");
                controller.leave().await;
            } else {
                tracing::info!("shutting down");
                controller.shutdown().await;
            }
        }
    };
    let attach = if config.api.attach { Some(attach::local(RUN_DIR.into())?) } else { None };
    let served = medes_api::serve(listener, controller.clone(), attach, stop).await;
    if controller.is_leaving() {
        node.leave();
        tracing::info!("the daemon has ended; its sandboxes go on");
    } else {
        node.close().await;
        tracing::info!("the platform has ended");
    }
    served.context("serving the HTTP API")
}

/// Runs the keeper.
///
/// # Errors
/// If it can't start.
pub fn run_keeper(config: &KeeperConfig, log: &Log) -> anyhow::Result<()> {
    log_to_stderr(log)?;
    raise_descriptor_limit();
    medes_keeper::run(config).context("the keeper")
}

/// Lets this process have as many descriptors as it may need, or as many as it is allowed to have.
fn raise_descriptor_limit() {
    let resource = Resource::RLIMIT_NOFILE;
    let Ok((_, hard)) = getrlimit(resource) else { return };
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let most = most.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(DESCRIPTORS);
    let wanted = DESCRIPTORS.min(most).max(hard);
    let raised = setrlimit(resource, wanted, wanted).or_else(|_| setrlimit(resource, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

pub(crate) fn log_to_stderr(log: &Log) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&log.level)
        .with_context(|| format!("[log] level = {:?} in the configuration", log.level))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            builder.with_ansi(std::io::stderr().is_terminal()).init();
        }
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

fn node_config(config: &Config) -> anyhow::Result<NodeConfig> {
    let memory = total_memory()?;
    Ok(NodeConfig {
        node: NodeId(0),
        data_dir: config.node.data_dir.clone(),
        run_dir: config.node.run_dir.clone(),
        cgroup: config.node.cgroup.clone(),
        uid_base: config.node.uid_base,
        memory_budget: config.node.memory_budget.of(memory),
        store_capacity: config.node.store_capacity.of(memory),
        log_bytes: config.node.log_bytes_per_function.0,
        scratch_bytes: config.node.scratch_size.0,
        pids_max: config.node.pids_max,
        init_timeout_ms: config.node.init_timeout.millis(),
        keeper_program: std::env::current_exe().context("finding this program")?,
        keeper_arguments: vec![
            KEEPER_COMMAND.to_owned(),
            "--cgroup".to_owned(),
            config.node.cgroup.clone(),
            "--log-level".to_owned(),
            config.log.level.clone(),
        ],
        dedup: DedupConfig {
            cardinality: u8::try_from(config.dedup.cardinality).unwrap_or(u8::MAX),
            chunk_size: u16::try_from(config.dedup.chunk_size).unwrap_or(u16::MAX),
            workers: config.dedup.workers as usize,
            restore_target: config.dedup.restore_target.0,
            // As long as the dedup sandboxes that would need them.
            base_idle_ms: config.lifecycle.keep_dedup.millis(),
        },
    })
}

fn controller_config(config: &Config) -> ControllerConfig {
    let lifecycle = &config.lifecycle;
    let limits = &config.limits;
    ControllerConfig {
        data_dir: config.node.data_dir.clone(),
        policy: config.policy_settings(),
        max_dedups: lifecycle.max_dedups,
        base_threshold: config.dedup.base_threshold,
        partial_restore: config.dedup.partial_restore,
        joined_tenants: config.dedup.joined_tenants.clone(),
        max_sandboxes: limits.max_sandboxes,
        max_sandboxes_per_function: limits.max_sandboxes_per_function,
        queue_limit: limits.queue as usize,
        queue_timeout_ms: limits.queue_wait.millis(),
        max_payload: limits.payload.0 as usize,
        max_response: limits.response.0 as usize,
        max_code: limits.code.0,
        max_code_unpacked: limits.code_unpacked.0,
        shutdown_grace_ms: lifecycle.shutdown_grace.millis(),
        ..ControllerConfig::default()
    }
}

fn total_memory() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    Ok(kib.context("/proc/meminfo has no MemTotal")? * 1024)
}
