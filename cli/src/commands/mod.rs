//! The command line.

mod debug;
mod dev;
mod host;
mod moves;
mod output;
mod processes;
mod serve;
mod volume;

use crate::admin::api::{ClusterStatus, CreatePool, DeviceInfo, Done, RenameNode, StopNode};
use crate::admin::client::{Client, ClientError};
use crate::cluster::events::Event;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use hyper::Method;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use xsan_env::os;
use xsan_types::Scheme;

/// XSAN turns disks into one pool of virtual disks that survive lost nodes.
#[derive(Debug, Parser)]
#[command(
    name = "xsan",
    version,
    after_help = "Examples:
  xsan dev --dir /var/tmp/xsan                      a six-node cluster in this process
  export XSAN_ADMIN=/var/tmp/xsan/admin.sock        where the other commands find it
  xsan volume create vm1 --size 100GiB              a thin virtual disk
  qemu-img info 'nbd+unix:///vm1?socket=/var/tmp/xsan/nbd.sock'
  xsan node stop n3 && xsan status                  lose a node and see what it means"
)]
struct Cli {
    /// Admin socket of the cluster.
    #[arg(long, global = true, env = "XSAN_ADMIN", value_name = "SOCKET")]
    admin: Option<PathBuf>,
    /// How results are printed.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Log filter on stderr, for example `info` or `lsm_block=debug` (also RUST_LOG).
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Tables and sentences.
    Text,
    /// One JSON document with stable field names.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a cluster in this process, in the foreground, until SIGTERM or SIGINT.
    Dev(dev::DevArgs),
    /// Show what is up, what is degraded, since when and why. Exits 0 once the cluster can serve.
    Status,
    /// List what is not as it should be, with codes and advice. Exits 0 if nothing is, 3 otherwise.
    Health,
    /// Tell what happened in the cluster, as the node that is asked learned it since its start.
    Events {
        /// Go on as things happen, until interrupted.
        #[arg(long, short)]
        follow: bool,
    },
    /// Make and remove pools.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Make, look at, change and remove volumes.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Make a cluster of hosts, and let hosts in.
    #[command(subcommand)]
    Cluster(host::ClusterCommand),
    /// Join, run, look at, stop and start nodes.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Look at devices.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Read devices and metadata files, changing nothing: for finding out what went wrong.
    #[command(subcommand)]
    Debug(debug::DebugCommand),
    /// Print a shell completion script.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Make a pool.
    #[command(after_help = "Examples:
  xsan pool create --ec 4+2            survives two lost nodes at 1.5x space
  xsan pool create fast --replicas 3   survives two lost nodes at 3x space")]
    Create(CreatePoolArgs),
    /// List pools.
    List,
    /// Remove a pool that has no volumes.
    Delete {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Args)]
struct CreatePoolArgs {
    /// Its name; by default derived from the scheme (ec-4-2).
    name: Option<String>,
    /// Erasure coding with K data and M parity shards: survives M lost nodes at (K+M)/K times the space.
    #[arg(long, value_name = "K+M", conflicts_with = "replicas", required_unless_present = "replicas")]
    ec: Option<Scheme>,
    /// N whole copies: survives N-1 lost nodes at N times the space.
    #[arg(long, value_name = "N")]
    replicas: Option<u8>,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// List the devices of all nodes.
    List,
    /// Make a blank disk of the host that is asked a device. Its share of the data moves there by itself.
    Add {
        /// A block device or file on that host.
        path: PathBuf,
    },
    /// Move a device's data to the others, then forget it. Shows progress; goes on if this command is interrupted. One that is
    /// missing is given up: what it held is rebuilt from others.
    Remove {
        /// Its id, or how it begins (`xsan device list`).
        device: String,
        /// Give a missing device up without being asked.
        #[arg(long)]
        yes: bool,
        /// Do not wait until its data has moved; give the command again later.
        #[arg(long)]
        no_wait: bool,
    },
    /// Add a disk and move the data of another device to it (and to the rest, as they are due).
    Replace {
        /// The id of the device that goes, or how it begins.
        device: String,
        /// A blank block device or file of the host that is asked.
        path: PathBuf,
        /// Give a missing device up without being asked.
        #[arg(long)]
        yes: bool,
        /// Do not wait until its data has moved.
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Make this host a node of a cluster and start its daemon.
    Join(Box<host::JoinArgs>),
    /// Run this host's daemon in the foreground, until SIGTERM or SIGINT: what systemd starts.
    Run(host::RunArgs),
    /// List nodes.
    List,
    /// Show one node: its state, since when, why, and its devices.
    Show {
        /// Its name.
        name: String,
    },
    /// Give a node another name.
    Rename {
        /// Its name.
        name: String,
        /// Its new name.
        new_name: String,
    },
    /// Move all data off a node, so that it can be unplugged without loss of redundancy. Shows progress; goes on if this
    /// command is interrupted.
    #[command(after_help = "Example:
  xsan node drain n3 && ssh n3 systemctl disable --now xsan && xsan node remove n3")]
    Drain {
        /// Its name.
        name: String,
        /// Take it back in: data moves back.
        #[arg(long)]
        cancel: bool,
        /// Do not wait until its data has moved.
        #[arg(long)]
        no_wait: bool,
    },
    /// Forget a node that is down for good and holds no positions of placement groups. Asks first.
    Remove {
        /// Its name.
        name: String,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// Stop a node: its shards are served from the others until it is started again.
    Stop {
        /// Its name.
        name: String,
        /// As a crash of its process would: nothing is flushed, calls under way fail.
        #[arg(long)]
        crash: bool,
    },
    /// Start a stopped node.
    Start {
        /// Its name.
        name: String,
    },
}

/// What a command ends with when it does not end well.
enum Failure {
    Client(ClientError),
    Cluster(crate::error::ClusterError),
    /// Wrong use, with the next step.
    Usage(String, Option<String>),
    /// There are problems, which were told already.
    Unhealthy,
}

/// How `health` ends when there are problems.
const UNHEALTHY: u8 = 3;

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<crate::error::ClusterError> for Failure {
    fn from(error: crate::error::ClusterError) -> Self {
        Self::Cluster(error)
    }
}

/// Exit codes by kind (docs/errors.md).
fn exit_code(kind: &str) -> u8 {
    match kind {
        "invalid" => 2,
        "not_found" => 4,
        "exists" => 5,
        "no_space" => 6,
        "unavailable" => 7,
        "fenced" => 8,
        "corrupt" => 9,
        "closed" => 10,
        _ => 1,
    }
}

impl Failure {
    fn report(&self) -> u8 {
        let (kind, message, next) = match self {
            Self::Unhealthy => return UNHEALTHY,
            Self::Client(error @ ClientError::Connect { path, .. }) => {
                let next = format!(
                    "start it with `xsan dev --dir DIR`, or name its socket: --admin DIR/admin.sock (tried {})",
                    path.display()
                );
                ("unavailable".to_owned(), error.to_string(), Some(next))
            }
            Self::Client(ClientError::Refused(error)) => {
                (error.kind.clone(), error.message.clone(), error.next_step.clone())
            }
            Self::Client(error) => ("internal".to_owned(), error.to_string(), None),
            Self::Cluster(error) => {
                (crate::admin::server::kind_name(error.kind()).to_owned(), error.to_string(), error.next_step())
            }
            Self::Usage(message, next) => ("invalid".to_owned(), message.clone(), next.clone()),
        };
        eprintln!("xsan: {message}");
        if let Some(next) = next {
            eprintln!("      {next}");
        }
        exit_code(&kind)
    }
}

/// Parses the command line and does it.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    init_logs(cli.log.as_deref(), matches!(cli.command, Command::Dev(_) | Command::Node(NodeCommand::Run(_))));
    let workers = match &cli.command {
        Command::Dev(args) => args.workers(),
        Command::Node(NodeCommand::Run(args)) => args.workers(),
        _ => 1,
    };
    let runtime = match os::build_runtime(workers) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("xsan: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(dispatch(cli));
    // Work on blocking threads (an fsync under way) ends with the process.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ExitCode::from(failure.report()),
    }
}

fn init_logs(filter: Option<&str>, server: bool) {
    use tracing_subscriber::EnvFilter;
    let default = if server { "info" } else { "warn" };
    let filter = match filter {
        Some(filter) => EnvFilter::new(filter),
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default)),
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let is_colourful = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let _ = logs.with_ansi(is_colourful).try_init();
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let admin = cli.admin;
    let client = || -> Result<Client, Failure> {
        let socket = admin.clone().or_else(installed_socket).ok_or_else(no_admin)?;
        Ok(Client::new(os::OsRuntime::current(), socket))
    };
    match cli.command {
        Command::Dev(args) => dev::run(args).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "xsan", &mut std::io::stdout());
            Ok(())
        }
        Command::Debug(command) => debug::run(command, cli.output).await,
        Command::Status => status(&client()?, cli.output).await,
        Command::Health => health(&client()?, cli.output).await,
        Command::Events { follow } => events(&client()?, follow, cli.output).await,
        Command::Device(DeviceCommand::List) => devices(&client()?, cli.output).await,
        Command::Device(command) => moves::device(&client()?, command, cli.output).await,
        Command::Pool(command) => pool(&client()?, command, cli.output).await,
        Command::Volume(command) => volume::run(&client()?, command, cli.output).await,
        Command::Cluster(command) => host::cluster(command, client().ok(), cli.output).await,
        Command::Node(NodeCommand::Join(args)) => host::join(*args, cli.output).await,
        Command::Node(NodeCommand::Run(args)) => host::run(args).await,
        Command::Node(command) => node(&client()?, command, cli.output).await,
    }
}

/// The socket of the daemon that is installed on this host, if there is one.
fn installed_socket() -> Option<PathBuf> {
    let socket = PathBuf::from("/var/lib/xsan/admin.sock");
    socket.exists().then_some(socket)
}

fn no_admin() -> Failure {
    Failure::Usage(
        "which cluster? no admin socket was named".into(),
        Some("pass --admin DIR/admin.sock or set XSAN_ADMIN".into()),
    )
}

async fn fetch(client: &Client) -> Result<ClusterStatus, Failure> {
    Ok(client.call(Method::GET, "/v1/status", &Done {}).await?)
}

async fn status(client: &Client, output: Output) -> Result<(), Failure> {
    let status = fetch(client).await?;
    match output {
        Output::Json => output::json(&status),
        Output::Text => output::status(&status),
    }
    Ok(())
}

async fn health(client: &Client, output: Output) -> Result<(), Failure> {
    let status = fetch(client).await?;
    match output {
        Output::Json => output::json(&status.problems),
        Output::Text => output::problems(&status.problems),
    }
    if status.problems.is_empty() { Ok(()) } else { Err(Failure::Unhealthy) }
}

async fn events(client: &Client, follow: bool, output: Output) -> Result<(), Failure> {
    let mut after = 0;
    loop {
        let wait = if follow && after > 0 { 30 } else { 0 };
        let path = format!("/v1/events?after={after}&wait={wait}");
        let events: Vec<Event> = client.call(Method::GET, &path, &Done {}).await?;
        for event in &events {
            match output {
                // One document a line: a stream has no end to close a list at.
                Output::Json => output::put(&serde_json::to_string(event).unwrap_or_default()),
                Output::Text => output::event(event),
            }
        }
        if !follow {
            return Ok(());
        }
        after = events.last().map_or(after.max(1), |event| event.number);
    }
}

async fn devices(client: &Client, output: Output) -> Result<(), Failure> {
    let nodes = fetch(client).await?.nodes;
    let devices: Vec<(String, DeviceInfo)> = nodes
        .into_iter()
        .flat_map(|node| node.devices.into_iter().map(move |device| (node.name.clone(), device)))
        .collect();
    match output {
        Output::Json => {
            #[derive(serde::Serialize)]
            struct Listed<'a> {
                node: &'a str,
                #[serde(flatten)]
                device: &'a DeviceInfo,
            }
            output::json(&devices.iter().map(|(node, device)| Listed { node, device }).collect::<Vec<_>>());
        }
        Output::Text => output::devices(&devices),
    }
    Ok(())
}

async fn pool(client: &Client, command: PoolCommand, output: Output) -> Result<(), Failure> {
    match command {
        PoolCommand::List => {
            let pools = fetch(client).await?.pools;
            match output {
                Output::Json => output::json(&pools),
                Output::Text => output::pools(&pools),
            }
            Ok(())
        }
        PoolCommand::Create(args) => {
            let scheme = match (args.ec, args.replicas) {
                (Some(scheme), _) if !scheme.is_replica() => scheme,
                (Some(_), _) => {
                    return Err(Failure::Usage(
                        "--ec takes K+M, for example 4+2".into(),
                        Some("for whole copies say --replicas N".into()),
                    ));
                }
                (None, Some(n)) => Scheme::replica(n).map_err(|error| Failure::Usage(error.to_string(), None))?,
                (None, None) => return Err(Failure::Usage("say --ec K+M or --replicas N".into(), None)),
            };
            let done: Done = client.call(Method::POST, "/v1/pools", &CreatePool { name: args.name, scheme }).await?;
            output::done(
                output,
                &done,
                &format!("pool created: {scheme}, survives {} lost node(s)", scheme.tolerates()),
            );
            Ok(())
        }
        PoolCommand::Delete { name } => {
            let done: Done = client.call(Method::DELETE, &format!("/v1/pools/{name}"), &Done {}).await?;
            output::done(output, &done, &format!("pool {name} deleted"));
            Ok(())
        }
    }
}

async fn node(client: &Client, command: NodeCommand, output: Output) -> Result<(), Failure> {
    match command {
        NodeCommand::List => {
            let nodes = fetch(client).await?.nodes;
            match output {
                Output::Json => output::json(&nodes),
                Output::Text => output::nodes(&nodes),
            }
        }
        NodeCommand::Join(_) | NodeCommand::Run(_) => unreachable!("done without a client"),
        NodeCommand::Show { name } => {
            let nodes = fetch(client).await?.nodes;
            let node = nodes.iter().find(|node| node.name == name);
            let node = node.ok_or_else(|| crate::error::ClusterError::NoNode(name.clone()))?;
            match output {
                Output::Json => output::json(node),
                Output::Text => output::node(node),
            }
        }
        NodeCommand::Rename { name, new_name } => {
            let request = RenameNode { name: new_name.clone() };
            let done: Done = client.call(Method::PATCH, &format!("/v1/nodes/{name}"), &request).await?;
            output::done(output, &done, &format!("node {name} is {new_name} now"));
        }
        NodeCommand::Remove { name, yes } => {
            volume::confirm(yes, &format!("Forget node {name}? It is not let in again."))?;
            let done: Done = client.call(Method::DELETE, &format!("/v1/nodes/{name}"), &Done {}).await?;
            output::done(output, &done, &format!("node {name} removed"));
        }
        NodeCommand::Drain { name, cancel, no_wait } => moves::drain(client, &name, cancel, no_wait, output).await?,
        NodeCommand::Stop { name, crash } => {
            let path = format!("/v1/nodes/{name}/stop");
            let done: Done = client.call(Method::POST, &path, &StopNode { crash }).await?;
            output::done(output, &done, &format!("node {name} stopped; start it again with `xsan node start {name}`"));
        }
        NodeCommand::Start { name } => {
            let done: Done = client.call(Method::POST, &format!("/v1/nodes/{name}/start"), &Done {}).await?;
            output::done(output, &done, &format!("node {name} started"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_kind_has_its_documented_exit_code() {
        use xsan_types::ErrorKind as K;
        let kinds = [
            (K::Invalid, 2),
            (K::NotFound, 4),
            (K::Exists, 5),
            (K::NoSpace, 6),
            (K::Unavailable, 7),
            (K::Fenced, 8),
            (K::Corrupt, 9),
            (K::Closed, 10),
            (K::Internal, 1),
        ];
        for (kind, code) in kinds {
            assert_eq!(exit_code(crate::admin::server::kind_name(kind)), code);
        }
    }
}
