//! `xsan volume …`

use super::{Failure, Output, fetch, output};
use crate::admin::api::{ChangeVolume, CreateVolume, DeleteVolume, Done, SetAddress, VolumeInfo};
use crate::admin::client::Client;
use clap::Subcommand;
use hyper::Method;
use std::io::{BufRead, IsTerminal, Write};
use xsan_types::parse_bytes;

fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Make a volume: a thin virtual disk that takes space only for what is written.
    #[command(after_help = "Example: xsan volume create vm1 --size 1TiB")]
    Create {
        /// Its name: letters, digits, `.`, `_`, `-`.
        name: String,
        /// Its size, for example 100GiB.
        #[arg(long, value_parser = size)]
        size: u64,
        /// Its pool; the default pool if left out.
        #[arg(long)]
        pool: Option<String>,
        /// When writes are acknowledged: `replicated` (on several nodes, stable at the next flush) or `persisted` (stable at once).
        #[arg(long, value_parser = ["replicated", "persisted"])]
        ack: Option<String>,
        /// An address that follows the volume from host to host, for NBD clients on the network, for example 10.0.0.50/24.
        #[arg(long, value_name = "ADDR/PREFIX")]
        address: Option<String>,
        /// The interface for it, of that name on every host; by default the one in its subnet.
        #[arg(long, requires = "address")]
        interface: Option<String>,
    },
    /// List volumes.
    List,
    /// Show one volume.
    #[command(visible_alias = "show")]
    Stat {
        /// Its name.
        name: String,
    },
    /// Change a volume's size. Clients see the new size when they connect again.
    Resize {
        /// Its name.
        name: String,
        /// The new size, for example 200GiB.
        #[arg(long, value_parser = size)]
        size: u64,
        /// Allow a smaller size: what lies beyond it is discarded.
        #[arg(long)]
        shrink: bool,
    },
    /// Give a volume an address that follows it from host to host, for NBD clients on the network.
    #[command(after_help = "Examples:
  xsan volume set-address vm1 10.0.0.50/24
  xsan volume set-address vm1 --none")]
    SetAddress {
        /// Its name.
        name: String,
        /// The address with its prefix; nobody else may have it.
        #[arg(value_name = "ADDR/PREFIX", required_unless_present = "none", conflicts_with = "none")]
        address: Option<String>,
        /// The interface it is put on, of that name on every host; by default the one in its subnet.
        #[arg(long, conflicts_with = "none")]
        interface: Option<String>,
        /// Take its address away; clients there are cut off.
        #[arg(long)]
        none: bool,
    },
    /// Give a volume another name.
    Rename {
        /// Its name.
        name: String,
        /// Its new name.
        new_name: String,
    },
    /// Move a volume to the node that is asked: it is served there from now on. Its clients elsewhere are cut off.
    #[command(after_help = "\
Before a guest migrates to another host, there:
  xsan volume attach vm1 --standby")]
    Attach {
        /// Its name.
        name: String,
        /// Do not move it yet: for ten minutes clients may open it here while it is served elsewhere. The first change that one of
        /// them asks for moves it.
        #[arg(long)]
        standby: bool,
    },
    /// Delete a volume and everything in it. Asks first.
    Delete {
        /// Its name.
        name: String,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
        /// Cut off clients that are connected.
        #[arg(long)]
        force: bool,
    },
}

pub(super) async fn run(client: &Client, command: VolumeCommand, output: Output) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create { name, size, pool, ack, address, interface } => {
            let address = address.map(|address| SetAddress { address: Some(address), interface });
            let request = CreateVolume { name: name.clone(), size, pool, ack, address };
            let _: Done = client.call(Method::POST, "/v1/volumes", &request).await?;
            let volume = find(client, &name).await?;
            match output {
                Output::Json => output::json(&volume),
                Output::Text => output::line!("volume {name} created: {}", volume.uri),
            }
        }
        VolumeCommand::List => {
            let volumes = fetch(client).await?.volumes;
            match output {
                Output::Json => output::json(&volumes),
                Output::Text => output::volumes(&volumes),
            }
        }
        VolumeCommand::Stat { name } => {
            let volume = find(client, &name).await?;
            match output {
                Output::Json => output::json(&volume),
                Output::Text => output::volume(&volume),
            }
        }
        VolumeCommand::Resize { name, size, shrink } => {
            let request = ChangeVolume { size: Some(size), shrink, name: None };
            let done: Done = client.call(Method::PATCH, &format!("/v1/volumes/{name}"), &request).await?;
            output::done(output, &done, &format!("volume {name} resized; clients see it when they connect again"));
        }
        VolumeCommand::SetAddress { name, address, interface, none: _ } => {
            let told = match &address {
                Some(address) => format!("volume {name} is reached at {address}, whichever host serves it"),
                None => format!("volume {name} has no address of its own any more"),
            };
            let request = SetAddress { address, interface };
            let done: Done = client.call(Method::POST, &format!("/v1/volumes/{name}/address"), &request).await?;
            output::done(output, &done, &told);
        }
        VolumeCommand::Rename { name, new_name } => {
            let request = ChangeVolume { name: Some(new_name.clone()), ..ChangeVolume::default() };
            let done: Done = client.call(Method::PATCH, &format!("/v1/volumes/{name}"), &request).await?;
            output::done(output, &done, &format!("volume {name} is {new_name} now"));
        }
        VolumeCommand::Attach { name, standby: true } => {
            let done: Done = client.call(Method::POST, &format!("/v1/volumes/{name}/standby"), &Done {}).await?;
            output::done(
                output,
                &done,
                &format!("volume {name} may be opened here; it moves here with the first change"),
            );
        }
        VolumeCommand::Attach { name, standby: false } => {
            let done: Done = client.call(Method::POST, &format!("/v1/volumes/{name}/attach"), &Done {}).await?;
            output::done(output, &done, &format!("volume {name} is served here"));
        }
        VolumeCommand::Delete { name, yes, force } => {
            let volume = find(client, &name).await?;
            if !yes {
                ask(&volume)?;
            }
            let path = format!("/v1/volumes/{name}");
            let done: Done = client.call(Method::DELETE, &path, &DeleteVolume { force }).await?;
            output::done(output, &done, &format!("volume {name} deleted"));
        }
    }
    Ok(())
}

async fn find(client: &Client, name: &str) -> Result<VolumeInfo, Failure> {
    let found = fetch(client).await?.volumes.into_iter().find(|volume| volume.name == name);
    found.ok_or_else(|| crate::error::ClusterError::NoVolume(name.to_owned()).into())
}

/// A yes to `question`, from the command line or from a person.
pub(super) fn confirm(yes: bool, question: &str) -> Result<(), Failure> {
    let next = Some("pass --yes to do it without being asked".to_owned());
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage("this cannot be undone and nobody is here to confirm it".into(), next));
    }
    eprint!("{question} Type yes: ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    match std::io::stdin().lock().read_line(&mut line) {
        Ok(_) if line.trim() == "yes" => Ok(()),
        _ => Err(Failure::Usage("not confirmed, nothing was done".into(), next)),
    }
}

/// Nothing irreversible without asking.
fn ask(volume: &VolumeInfo) -> Result<(), Failure> {
    let next = Some("pass --yes to delete without being asked".to_owned());
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage("deleting a volume cannot be undone and nobody is here to confirm it".into(), next));
    }
    let size = xsan_types::format_bytes(volume.size);
    eprint!("Delete volume {} ({size}) and everything in it? This cannot be undone. Type its name: ", volume.name);
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    match std::io::stdin().lock().read_line(&mut line) {
        Ok(_) if line.trim() == volume.name => Ok(()),
        _ => Err(Failure::Usage("not confirmed, nothing was deleted".into(), next)),
    }
}
