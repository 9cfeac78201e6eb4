use crate::support::{MODERN, NAME, World, is_closed, refused};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use xsan_env::net::Stream;
use xsan_gateway::client::{ClientError, Negotiation};
use xsan_gateway::nbd::proto::{Style, command, option, option_reply as rep};
use xsan_gateway::{Tls, TlsError, TlsMode, server_config};

/// A CA with a server's and a client's certificate, all PEM.
struct Authority {
    ca: String,
    server: (String, String),
    client: (String, String),
}

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let ca = params.self_signed(&key).expect("signed").pem();
    let issuer = Issuer::new(params, key);
    let leaf = |purpose| {
        let mut params = CertificateParams::new(vec!["gateway.test".to_owned()]).expect("a name");
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, &issuer).expect("signed").pem(), key.serialize_pem())
    };
    let server = leaf(ExtendedKeyUsagePurpose::ServerAuth);
    let client = leaf(ExtendedKeyUsagePurpose::ClientAuth);
    Authority { ca, server, client }
}

fn tls(world: &World, authority: &Authority, mode: TlsMode, verify: bool) -> Tls {
    let ca = verify.then_some(authority.ca.as_bytes());
    let (certificate, key) = &authority.server;
    Tls::new(mode, server_config(&world.env, certificate.as_bytes(), key.as_bytes(), ca).expect("usable"))
}

fn connector(authority: &Authority, with_certificate: bool) -> TlsConnector {
    use rustls::pki_types::pem::PemObject;
    let certificate =
        |pem: &str| rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&authority.ca)).expect("a root");
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = if with_certificate {
        let key = PrivateKeyDer::from_pem_slice(authority.client.1.as_bytes()).expect("a key");
        builder.with_client_auth_cert(vec![certificate(&authority.client.0)], key).expect("usable")
    } else {
        builder.with_no_client_auth()
    };
    TlsConnector::from(Arc::new(config))
}

async fn upgrade(
    mut negotiation: Negotiation<Stream>,
    connector: TlsConnector,
) -> Result<Negotiation<TlsStream<Stream>>, ClientError> {
    negotiation.must(option::STARTTLS, &[]).await?;
    let name = ServerName::try_from("gateway.test").expect("a name");
    Ok(Negotiation::resume(connector.connect(name, negotiation.into_inner()).await?))
}

async fn start(world: &World, tls: Tls) -> Negotiation<Stream> {
    Negotiation::start(world.dial_tls(tls), MODERN).await.expect("a greeting")
}

fn only(name: &str) -> TlsMode {
    TlsMode::Selective(Arc::new(BTreeSet::from([name.to_owned()])))
}

#[tokio::test]
async fn forced_tls_answers_nothing_before_it_and_everything_after() {
    let (world, authority) = (World::new(), authority());
    let forced = tls(&world, &authority, TlsMode::Required, false);
    let mut negotiation = start(&world, forced.clone()).await;
    for code in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS, 77] {
        let error = negotiation.must(code, &[]).await.expect_err("not in clear text");
        assert_eq!(refused(&error), Some(rep::ERR_TLS_REQD), "option {code}");
    }
    let error = negotiation.must(option::INFO, &vec![0; 70_000]).await.expect_err("not in clear text");
    assert_eq!(refused(&error), Some(rep::ERR_TLS_REQD));
    let mut secure = upgrade(negotiation, connector(&authority, false)).await.expect("TLS");
    let error = secure.must(option::STARTTLS, &[]).await.expect_err("once is enough");
    assert_eq!(refused(&error), Some(rep::ERR_INVALID));
    assert_eq!(secure.list().await.expect("a list").len(), 1);
    secure.set_style(Style::Extended).await.expect("extended");
    let mut client = secure.go(NAME).await.expect("served");
    let data = crate::support::pattern(1, 3 << 20);
    client.write(512, &data, 0).await.expect("written");
    assert!(client.read(512, 3 << 20).await.expect("read") == data);
    client.command(command::FLUSH, 0, 0, 0).await.expect("flushed");
    assert!(world.server.clients(NAME)[0].encrypted);
    client.disconnect().await.expect("TLS is closed in order");
    let mut negotiation = start(&world, forced).await;
    negotiation.send_option(option::EXPORT_NAME, NAME.as_bytes()).await.expect("sent");
    assert!(is_closed(&negotiation.into_inner()).await, "no error can be told");
}

#[tokio::test]
async fn selective_tls_protects_the_named_exports_only() {
    let (world, authority) = (World::new(), authority());
    let mut open = start(&world, tls(&world, &authority, only("other"), false)).await;
    assert_eq!(open.list().await.expect("a list").len(), 1);
    assert!(open.go(NAME).await.expect("clear text is fine").read(0, 512).await.is_ok());
    let selective = tls(&world, &authority, only(NAME), false);
    let mut negotiation = start(&world, selective.clone()).await;
    assert_eq!(negotiation.list().await.expect("a list"), [], "left out");
    for code in [option::INFO, option::GO] {
        let error = negotiation.info(code, NAME).await.expect_err("TLS only");
        assert_eq!(refused(&error), Some(rep::ERR_TLS_REQD));
    }
    let error = negotiation.info(option::INFO, "nope").await.expect_err("unknown");
    assert_eq!(refused(&error), Some(rep::ERR_UNKNOWN));
    let mut secure = upgrade(negotiation, connector(&authority, false)).await.expect("TLS");
    assert_eq!(secure.list().await.expect("a list").len(), 1);
    assert!(secure.go(NAME).await.expect("served").read(0, 512).await.is_ok());
    let mut negotiation = start(&world, selective).await;
    negotiation.send_option(option::EXPORT_NAME, NAME.as_bytes()).await.expect("sent");
    assert!(is_closed(&negotiation.into_inner()).await);
}

#[tokio::test]
async fn starttls_forgets_what_was_negotiated_before() {
    let (world, authority) = (World::new(), authority());
    let mut negotiation = start(&world, tls(&world, &authority, only("other"), false)).await;
    negotiation.set_style(Style::Extended).await.expect("extended");
    negotiation.meta(option::SET_META_CONTEXT, NAME, &["base:allocation"]).await.expect("chosen");
    let error = negotiation.must(option::STARTTLS, b"x").await.expect_err("no data");
    assert_eq!(refused(&error), Some(rep::ERR_INVALID));
    let mut secure = upgrade(negotiation, connector(&authority, false)).await.expect("TLS");
    let error = secure.meta(option::SET_META_CONTEXT, NAME, &[]).await.expect_err("structured is forgotten");
    assert_eq!(refused(&error), Some(rep::ERR_INVALID));
    let mut client = secure.go(NAME).await.expect("served in simple style");
    assert!(client.call(Default::default()).await.expect("a reply").simple);
}

#[tokio::test]
async fn a_client_without_the_wanted_certificate_is_not_served() {
    let (world, authority) = (World::new(), authority());
    let strict = tls(&world, &authority, TlsMode::Required, true);
    let good = start(&world, strict.clone()).await;
    let secure = upgrade(good, connector(&authority, true)).await.expect("known client");
    assert!(secure.go(NAME).await.expect("served").read(0, 512).await.is_ok());
    for (who, connector) in [
        ("nobody", connector(&authority, false)),
        ("a stranger", {
            let stranger = self::authority();
            connector(&Authority { ca: authority.ca.clone(), ..stranger }, true)
        }),
    ] {
        let negotiation = start(&world, strict.clone()).await;
        // TLS 1.3 clients learn of the refusal at their first read.
        let served = match upgrade(negotiation, connector).await {
            Ok(mut secure) => secure.list().await.is_ok(),
            Err(_) => false,
        };
        assert!(!served, "{who}");
    }
}

#[tokio::test]
async fn options_sent_in_clear_text_behind_starttls_are_never_obeyed() {
    let (world, authority) = (World::new(), authority());
    let mut negotiation = start(&world, tls(&world, &authority, TlsMode::Required, false)).await;
    let mut bytes = Vec::new();
    for code in [option::STARTTLS, option::LIST] {
        bytes.extend(b"IHAVEOPT");
        bytes.extend(code.to_be_bytes());
        bytes.extend([0; 4]);
    }
    negotiation.stream().write_all(&bytes).await.expect("sent");
    let mut answer = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(negotiation.stream(), &mut answer).await.expect("closed");
    assert_eq!(answer[12..16], rep::ACK.to_be_bytes()[..], "STARTTLS is acknowledged");
    assert!(answer.len() < 40, "then at most a TLS alert, no list");
}

#[tokio::test]
async fn a_peer_that_does_not_speak_tls_after_starttls_is_closed() {
    let (world, authority) = (World::new(), authority());
    let mut negotiation = start(&world, tls(&world, &authority, TlsMode::Required, false)).await;
    negotiation.must(option::STARTTLS, &[]).await.expect("acknowledged");
    negotiation.stream().write_all(&[b'x'; 200]).await.expect("sent");
    assert!(is_closed(negotiation.stream()).await);
}

#[tokio::test]
async fn unusable_certificates_are_refused_with_the_reason() {
    let world = World::new();
    let (one, other) = (authority(), authority());
    let config = |certificate: &str, key: &str, ca: Option<&str>| {
        server_config(&world.env, certificate.as_bytes(), key.as_bytes(), ca.map(str::as_bytes)).map(drop)
    };
    let (certificate, key) = (&one.server.0, &one.server.1);
    assert!(config(certificate, key, Some(&one.ca)).is_ok());
    assert!(matches!(config("", key, None), Err(TlsError::Empty { what: "certificate" })));
    assert!(matches!(config(certificate, "", None), Err(TlsError::Pem { what: "private key", .. })));
    assert!(matches!(config(certificate, &other.server.1, None), Err(TlsError::Refused(_))), "of another certificate");
    assert!(matches!(config(certificate, key, Some("")), Err(TlsError::Empty { what: "client CA certificate" })));
}
