/**
 * Ids, branded: one kind never passes for another. A text that does not look
 * like an id of its kind is answered like an unknown one (404), so the `is…`
 * guards belong to the border.
 */
export type SandboxId = string & { readonly __id: "sandbox" };
export type SnapshotId = string & { readonly __id: "snapshot" };
export type TemplateId = string & { readonly __id: "template" };
export type HostId = string & { readonly __id: "host" };
export type TeamId = string & { readonly __id: "team" };
export type ApiKeyId = string & { readonly __id: "api-key" };

export const ID_PATTERNS = {
  sandbox: /^sb[a-z0-9]{18}$/,
  snapshot: /^snap-[a-z0-9]{20}$/,
  template: /^tpl-[a-z0-9]{20}$/,
  host: /^host-[a-z0-9]{20}$/,
  team: /^team-[a-z0-9]{20}$/,
  "api-key": /^key-[a-z0-9]{20}$/,
} as const;

export const isSandboxId = (text: string): text is SandboxId => ID_PATTERNS.sandbox.test(text);
export const isSnapshotId = (text: string): text is SnapshotId => ID_PATTERNS.snapshot.test(text);
export const isHostId = (text: string): text is HostId => ID_PATTERNS.host.test(text);
export const isTeamId = (text: string): text is TeamId => ID_PATTERNS.team.test(text);
export const isApiKeyId = (text: string): text is ApiKeyId => ID_PATTERNS["api-key"].test(text);
