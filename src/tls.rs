//! TLS towards backends: the client's side of a probe.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A client that trusts the authorities of a PEM file, or, without one, takes any certificate whose key the server
/// proves to have. Reading many authorities takes milliseconds.
///
/// # Errors
/// A sentence, when the library refuses its own defaults.
pub fn client(authorities: Option<&[u8]>) -> Result<Arc<ClientConfig>, String> {
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS: {error}"))?;
    let mut config = match authorities {
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            // One odd certificate among a hundred must not cost the others; that there is one at all was checked.
            let (added, _) = roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
            if added == 0 {
                return Err("a list of authorities holds no certificate that can be used".into());
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
        None => {
            let any = Arc::new(AnyCertificate(provider));
            builder.dangerous().with_custom_certificate_verifier(any).with_no_client_auth()
        }
    };
    // Each probe is to be a whole handshake.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// The end of the year 9999, in seconds since 1970.
const LAST_SECOND: i64 = 253_402_300_800;

/// When a certificate ends, in seconds since 1970; `None` when it cannot be read.
pub fn expiry(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    // Whoever shows it may write any time; those that no calendar has are no times.
    Some(certificate.validity().not_after.timestamp()).filter(|at| (1..LAST_SECOND).contains(at))
}

/// Accepts any certificate, but not one whose key the server has not.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
