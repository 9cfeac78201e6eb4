//! Serves a volume in memory over NBD: what the protocol costs by itself, and something for other tools to talk to.
//!
//! `memory_server --socket PATH [--tcp ADDR:PORT] [--size 1GiB] [--name vm1] [--single] [--read-only] [--threads N]`
//! `[--tls DIR]`
//!
//! `--single`: no multi-conn. `--tls DIR`: `server-cert.pem` and `server-key.pem` in DIR; with `ca-cert.pem` clients need
//! a certificate. Prints `ready` when it can be connected to; SIGTERM or SIGINT stop it in order.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program of its own: it reads certificates and makes the runtime"
)]

use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use xsan_env::net::{Listener, UnixOptions};
use xsan_env::{BufPool, OsRuntime};
use xsan_gateway::memory_export::{MemoryExport, MemoryExports};
use xsan_gateway::{Export, Limits, Server, Tls, TlsMode, server_config};

type Error = Box<dyn std::error::Error>;

struct Options {
    socket: Option<String>,
    tcp: Option<String>,
    size: u64,
    name: String,
    single: bool,
    read_only: bool,
    threads: usize,
    tls: Option<String>,
}

fn parse_size(text: &str) -> Result<u64, Error> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match &text[digits..] {
        "" => 0,
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        "TiB" | "T" => 40,
        _ => return Err(format!("{text} is no size").into()),
    };
    Ok(text[..digits].parse::<u64>()? << shift)
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, Error> {
    let mut options = Options {
        socket: None,
        tcp: None,
        size: 1 << 30,
        name: "vm1".into(),
        single: false,
        read_only: false,
        threads: 2,
        tls: None,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--socket" => options.socket = Some(value()?),
            "--tcp" => options.tcp = Some(value()?),
            "--size" => options.size = parse_size(&value()?)?,
            "--name" => options.name = value()?,
            "--single" => options.single = true,
            "--read-only" => options.read_only = true,
            "--threads" => options.threads = value()?.parse()?,
            "--tls" => options.tls = Some(value()?),
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    Ok(options)
}

async fn run(options: Options) -> Result<(), Error> {
    let env = OsRuntime::current();
    let pool = BufPool::new(0, 64 << 20);
    let mut info = MemoryExport::new(&options.name, options.size, !options.single, pool.clone()).info();
    info.description = "memory".into();
    info.read_only = options.read_only;
    let export: Arc<dyn Export> = Arc::new(MemoryExport::with_info(info, pool.clone()));
    let server = Server::new(env.clone(), pool, Arc::new(MemoryExports::new([export])), Limits::default());
    let tls = match &options.tls {
        None => Tls::off(),
        Some(dir) => {
            let file = |name: &str| std::fs::read(format!("{dir}/{name}"));
            let ca = file("ca-cert.pem").ok();
            let config = server_config(&env, &file("server-cert.pem")?, &file("server-key.pem")?, ca.as_deref())?;
            Tls::new(TlsMode::Required, config)
        }
    };
    if let Some(path) = &options.socket {
        drop(server.listen(Listener::unix(path, &UnixOptions::default()).await?, tls.clone()));
    }
    if let Some(address) = &options.tcp {
        let listener = Listener::tcp(address.parse()?).await?;
        println!("listening on {}", listener.describe());
        drop(server.listen(listener, tls));
    }
    println!("ready");
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        biased;
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    server.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

fn main() -> Result<(), Error> {
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    }
    let options = parse(std::env::args().skip(1))?;
    xsan_env::os::build_runtime(options.threads)?.block_on(run(options))
}
